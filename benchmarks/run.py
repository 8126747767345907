"""The clock: contenders take turns in one process, medians are kept, a line is appended.

python -m benchmarks.run --case components
"""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from benchmarks.cases import CASES, Comparison
from gpuroi.backends import get_backend

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "gpuroi",
    "numpy",
    "scipy",
    "nibabel",
    "pandas",
    "nilearn",
    "connected-components-3d",
    "cvxopt",
)


def time_alternately(
    contenders: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, list[float]]:
    """Return seconds a call, the contenders taking turns so that noise hits all of them.

    Every other turn runs backwards, so that nobody always follows the same one: what a contender
    leaves in caches and heap serves or hurts its neighbours on both sides.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.freeze()  # collections between the turns then look at young objects only
    gc.disable()
    names = list(contenders)
    for turn in range(repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            work = contenders[name]
            _flush()
            started = time.perf_counter()
            result = work()
            seconds[name].append(time.perf_counter() - started)
            del result
            gc.collect()
    gc.enable()
    gc.unfreeze()
    return seconds


def _flush() -> None:
    """Write to the disk what is to be written: the next contender is not to wait for it."""
    if hasattr(os, "sync"):
        os.sync()


def measure(comparison: Comparison, repeats: int | None = None) -> dict[str, Any]:
    """Return the record of one comparison, checked and timed."""
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        contenders = comparison.contenders
        comparison.check({name: work() for name, work in contenders.items()})
        seconds = time_alternately(contenders, repeats or comparison.repeats)
        peaks = {}
        if comparison.memory_of is not None and sys.platform == "linux":
            peaks = {name: comparison.memory_of(work) for name, work in contenders.items()}
    reference = next(iter(comparison.contenders))
    medians = {name: statistics.median(times) for name, times in seconds.items()}

    def turn_by_turn(one: str, other: str) -> float:
        """Return how often the time of `other` is that of `one`.

        Neighbours in time share the machine's mood, so ratios are taken turn by turn.
        """
        pairs = zip(seconds[one], seconds[other], strict=True)
        return statistics.median(time / other_time for time, other_time in pairs)

    record = {
        "comparison": comparison.name,
        "parameters": comparison.parameters,
        "reference": reference,
        "repeats": len(seconds[reference]),
        "median_s": medians,
        "speed_up": {name: turn_by_turn(reference, name) for name in seconds},
        "targets": comparison.targets,
        "peak_bytes": peaks,
        "most_bytes": comparison.most_bytes,
    }
    if comparison.floor is not None:
        floor, promised = comparison.floor
        record["floor"] = {
            "of": floor,
            "promised": promised,
            "times": {name: turn_by_turn(name, floor) for name in comparison.targets},
        }
    return record


def circumstances() -> dict[str, Any]:
    """Return when, where and with what a record was made."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or None
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        # Unknown where there is no repository to ask.
        "uncommitted_changes": None
        if commit is None
        else bool(git("status", "--porcelain", "--", "gpuroi", "benchmarks/*.py")),
        "processor": get_backend("cpu").device,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "blas_threads": 1,
        "versions": versions,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the cases asked for; return 1 if a promise was not kept."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--case", choices=sorted(CASES), action="append", help="default: all")
    parser.add_argument("--repeats", type=int, help="turns of each contender")
    parser.add_argument("--output", type=Path, help="file to append to (default: in results/)")
    parser.add_argument("--dry-run", action="store_true", help="print, but append nothing")
    options = parser.parse_args(arguments)

    kept = True
    for case in options.case or sorted(CASES):
        output = options.output or RESULTS / f"{case}.jsonl"
        for comparison in CASES[case](False):
            record = measure(comparison, options.repeats)
            print(f"{record['comparison']}:")
            for name, seconds in record["median_s"].items():
                speed_up, target = record["speed_up"][name], record["targets"].get(name)
                promise = "" if target is None else f"  (promised {target:g}x)"
                peak = record["peak_bytes"].get(name)
                memory = "" if peak is None else f"  peak {peak / 2**20:8.1f} MiB"
                print(f"  {name:26} {seconds * 1e3:10.3f} ms {speed_up:8.1f}x{memory}{promise}")
                kept &= target is None or speed_up >= target
            if record["most_bytes"] is not None:
                print(f"  (promised: no more than {record['most_bytes'] / 2**20:.0f} MiB)")
                kept &= max(record["peak_bytes"].values(), default=0) <= record["most_bytes"]
            for name, times in record.get("floor", {"times": {}})["times"].items():
                floor = record["floor"]
                print(f"  {name}: {times:.2f} times {floor['of']} (promised {floor['promised']})")
                kept &= times <= floor["promised"]
            if not options.dry_run:
                with output.open("a") as lines:
                    lines.write(json.dumps(record | circumstances()) + "\n")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

"""The command line: each part in a process of its own, with a limit, then the table."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import gpu
from benchmarks.gpu.case import run_case
from benchmarks.gpu.device import Device, cuda_device
from benchmarks.gpu.files import run_files
from benchmarks.gpu.records import ROOT, Log, Run, of_device, of_host
from benchmarks.gpu.suite import run_suite
from benchmarks.gpu.verdict import HEADING, promises, row, went_wrong
from benchmarks.gpu.work import CASES, FILES, STAGE_NEEDS_S, SUITE, Case
from gpuroi.errors import BackendUnavailableError

PARTS: dict[str, Case | None] = {SUITE: None} | {case.name: case for case in CASES}

RESERVE_S = 10.0  # of the budget, for the table
SUITE_NEEDS_S = 75.0
#: A part has so many times what it needs, and time to start: then it hangs, and is ended.
PATIENCE, START_S = 2.0, 10.0

NO_DEVICE, HANGS = 2, None

#: Measures a part within so many seconds; returns 0, or how its process ended, or `HANGS`.
RunPart = Callable[[str, argparse.Namespace, float], int | None]


def main(arguments: list[str] | None = None, run_part: RunPart | None = None) -> int:
    """Run everything; return 1 if something failed or was not identical, 2 without a GPU."""
    started = time.monotonic()
    options = _parser().parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.part is not None:
        return measure(options.part, options, options.budget_s)
    log = _Written(options)
    ends_at = started + options.budget_s - RESERVE_S
    for part in options.only or list(PARTS)[options.no_suite :]:
        ended = _run_part(log, part, options, ends_at - time.monotonic(), run_part or in_a_process)
        if ended == NO_DEVICE and not log.records():
            return NO_DEVICE
    records = log.records()
    print(f"\n{HEADING}")
    for record in records:
        print(row(record))
    for name, reason in next((r["missing"] for r in records if r["missing"]), {}).items():
        print(f"MISSING {name}: {reason}")
    for text, verdict in promises(records, time.monotonic() - started, options.budget_s):
        print(f"{verdict:12} {text}")
    return int(any(map(went_wrong, records)))


def _parser() -> argparse.ArgumentParser:
    description = gpu.__doc__
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=description)
    parser.add_argument("--only", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--no-suite", action="store_true", help="leave the contract suite out")
    parser.add_argument("--quick", action="store_true", help="tiny maps: a rehearsal")
    parser.add_argument("--budget-s", type=float, default=480.0, help="ends within so many seconds")
    parser.add_argument("--commit", help="what to record where git does not tell")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/gpu.jsonl")
    parser.add_argument("--part", choices=PARTS, help="measure this in this very process; no table")
    parser.add_argument("--run", default=uuid.uuid4().hex[:8], help="what its records are known by")
    return parser


def _circumstances(options: argparse.Namespace) -> dict[str, Any]:
    return {"run": options.run} | of_host(options.commit, options.quick)


class _Written:
    """What the parts of this run have written, each in its process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options

    def records(self) -> list[dict[str, Any]]:
        """Return the records of this run, among those of others in the file."""
        records = []
        if self._options.output.exists():
            for line in self._options.output.read_bytes().splitlines():
                with contextlib.suppress(ValueError):  # of a process that was ended meanwhile
                    records.append(json.loads(line))
        return [record for record in records if record.get("run") == self._options.run]

    def add(self, **record: Any) -> None:
        """Add what became of a part that cannot tell itself."""
        names = ("device", "processor", "versions", "missing")
        known = next(iter(self.records()), {})
        of_part = {name: known.get(name) for name in names}
        of_part |= _circumstances(self._options)
        Log(output=self._options.output, circumstances=of_part).add(**record)


def _run_part(
    log: _Written, part: str, options: argparse.Namespace, left_s: float, run_part: RunPart
) -> int | None:
    """Run a part if there is time, and record it if it does not end well."""
    case = PARTS[part]
    needs_s = SUITE_NEEDS_S if case is None else case.needs_s
    if options.quick:
        needs_s = STAGE_NEEDS_S
    record = {"case": part, "stage": "-", "contender": "-"}
    if left_s < needs_s:
        log.add(**record, skipped=f"{max(0, left_s):.0f} s left, {needs_s:.0f} s needed")
        return 0
    limit_s = min(left_s, START_S + PATIENCE * needs_s)
    ended = run_part(part, options, limit_s)
    if ended is HANGS:
        log.add(**record, failed=f"hung: not done after {limit_s:.0f} s")
    elif ended != 0 and (ended != NO_DEVICE or log.records()):
        log.add(**record, failed=f"its process ended with {ended}")
    return ended


def in_a_process(part: str, options: argparse.Namespace, limit_s: float) -> int | None:
    """Measure a part where it takes nothing with it if it hangs or breaks the device's context."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part]
    command += ["--output", str(options.output.absolute()), "--budget-s", f"{limit_s:.1f}"]
    command += ["--run", options.run]
    command += ["--quick"] * options.quick
    command += [] if options.commit is None else ["--commit", options.commit]
    return within(command, limit_s)


def within(command: list[str], limit_s: float) -> int | None:
    """Return how a command ended; None if it did not, after which it and all it started are."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return HANGS
    finally:
        if process.poll() is None:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it has started."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may keep it for ever
        process.wait(5)


def measure(
    part: str,
    options: argparse.Namespace,
    limit_s: float,
    find_device: Callable[[], Device] = cuda_device,
) -> int:
    """Measure a part in this process; return 2 without a GPU."""
    started = time.monotonic()
    try:
        device = find_device()
    except BackendUnavailableError as reason:
        print(f"no CUDA run: {' '.join(str(reason).split())}", file=sys.stderr)
        return NO_DEVICE
    run = Run(
        device=device,
        output=options.output,
        ends_at=started + limit_s - min(STAGE_NEEDS_S, limit_s / 10),
        circumstances=_circumstances(options) | of_device(device),
    )
    case = PARTS[part]
    if case is None:
        run_suite(run)
        return 0
    if options.quick:
        tiny: dict[str, Any] = {"n_maps": min(case.n_maps, 3), "shape": (11, 12, 13)}
        case = replace(case, voxel_mm=4.0, **tiny)
    if part == FILES:
        work = partial(run_files, run, case)
    else:
        work = partial(run_case, run, case, options.quick)
    run.attempt(work, 0, **case.record(), stage="-", contender="-")
    return 0

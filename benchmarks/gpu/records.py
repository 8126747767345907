"""What was measured, on what and with what: a line a measurement."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import CPU, CUPY, OWN, Device, Elapsed, reason_of
from benchmarks.gpu.verdict import row
from benchmarks.gpu.work import BY_HAND, COHORT, DOOR, STAGE_NEEDS_S

ROOT = Path(__file__).parents[2]

MOST_REPEATS, REPEAT_S = 21, 1.5  # a measurement ends with whichever comes first

#: What is content with less memory than their batch was made in: if it was made, they have enough.
_LESS_THAN_A_BATCH = (OWN, BY_HAND, DOOR, COHORT)

_PACKAGES = ("cucim-cu13", "cucim-cu12", "pytest", "nibabel", "isal", "connected-components-3d")


@dataclass(kw_only=True)
class Log:
    """Where records go, and what each of them says besides what was measured."""

    output: Path
    circumstances: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **record: Any) -> None:
        """Write a record down at once: a run that is killed keeps what it had."""
        self.records.append(record)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        line = json.dumps(record | {"date": date} | self.circumstances) + "\n"
        with self.output.open("ab+") as lines:
            if lines.seek(0, os.SEEK_END) > 0:
                lines.seek(-1, os.SEEK_END)
                if lines.read() != b"\n":  # of a process that was ended while it wrote
                    lines.write(b"\n")
            lines.write(line.encode())
        print(row(record), flush=True)


@dataclass(kw_only=True)
class Run(Log):
    """What the measurements of a process share."""

    device: Device
    ends_at: float  # time.monotonic()
    copy_bytes_s: float | None = None  # read and written

    def attempt(
        self,
        work: Callable[[], dict[str, Any] | None],
        needs_s: float = STAGE_NEEDS_S,
        **record: Any,
    ) -> None:
        """Add what `work` measures, or why it has not: one failure silences no others."""
        outcome: dict[str, Any] | None
        if (left_s := self.ends_at - time.monotonic()) < needs_s:
            self.add(**record, skipped=f"{max(0, left_s):.0f} s left, {needs_s:.0f} s needed")
            return
        try:
            outcome = work()
        except MemoryError:
            fits = record["contender"] in _LESS_THAN_A_BATCH
            outcome = {"failed" if fits else "skipped": "out of memory"}
        except Exception as error:
            outcome = {"failed": reason_of(error)}
        if outcome is not None:
            self.add(**record, **outcome)
        with contextlib.suppress(Exception):  # a device that has failed refuses even this
            self.device.free()


def of_host(commit: str | None, quick: bool) -> dict[str, Any]:
    """Return what a record says of the code and the computer."""

    def git(*arguments: str) -> str | None:
        """Return what git says; None where there is no git, or no repository."""
        if shutil.which("git") is None:
            return None
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--", "gpuroi", "benchmarks/*.py")
    return {
        "commit": git("rev-parse", "--short", "HEAD") or commit,
        "uncommitted_changes": None if changes is None else bool(changes),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "quick": quick,
    }


def of_device(device: Device) -> dict[str, Any]:
    """Return what a record says of the device and the libraries."""
    versions = dict(device.backends[CUPY].versions())
    versions.pop("cuda-kernels", None)
    installed = {one.name: one.version for one in importlib.metadata.distributions()}
    return {
        "device": device.backends[CUPY].device,
        "processor": device.backends[CPU].device,
        "versions": versions | {name: installed[name] for name in _PACKAGES if name in installed},
        "missing": device.missing,
    }


def repeat(elapsed: Elapsed, works: Sequence[Callable[[], Any]], *known_s: float) -> list[float]:
    """Return the seconds of all `works` together, time after time, until a limit is reached."""
    seconds = list(known_s)
    while len(seconds) < MOST_REPEATS and sum(seconds) < REPEAT_S:
        seconds.append(sum(elapsed(work)[0] for work in works))
    return seconds


def times_of(seconds: list[float], timed_maps: int) -> dict[str, Any]:
    """Return the times of a record; where not all maps were timed, the others last as long."""
    median_s = statistics.median(seconds)
    times = {"median_s": median_s, "repeats": len(seconds), "timed_maps": timed_maps}
    return times | {"maps_per_s": timed_maps / median_s}

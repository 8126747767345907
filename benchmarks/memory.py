"""How much memory some work needs at its worst moment (Linux only)."""

import ctypes
import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_of_process(work: Callable[[], Any]) -> int:
    """Return the bytes that `work` added to the process at the worst moment.

    Resident memory, because what SuperLU and CHOLMOD allocate is hidden from Python.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or freed memory of earlier work would be counted as there
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark sinks to the present
    before = _status("VmHWM")
    result = work()
    peak = _status("VmHWM") - before
    del result
    return peak


def _status(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:"))


def peak_of_processes(work: Callable[[], Any]) -> int:
    """Return the bytes of this process and all it starts at the worst moment.

    What processes share is counted in parts: the sum is what the machine needs.
    """
    peak = 0
    has_ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not has_ended.wait(0.05):
            peak = max(peak, sum(map(_proportional_bytes, _with_descendants(os.getpid()))))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        work()
    finally:
        has_ended.set()
        watching.join()
    return peak


def _with_descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def _proportional_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))

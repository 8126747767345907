"""A GPU, and what there is on it to compare with."""

import importlib
import importlib.util
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

from gpuroi.backends import Backend, cuda, get_backend
from gpuroi.backends._kernels import Compiler, KernelVerbs
from gpuroi.types import Array

CPU, OWN, CUPY = "CPU backend", "own kernels", "CuPy"
CUPY_SINGLY, CUCIM_SINGLY = "CuPy, one by one", "cuCIM, one by one"

OPTIONAL = ("pytest", "nibabel", "nilearn", "pandas", "isal", "threadpoolctl", "filelock", "cc3d")

_PATH = re.compile(r"(?:/[\w.@+-]+){2,}")

Elapsed = Callable[[Callable[[], Any]], tuple[float, Any]]  # seconds of a call, and its result


@dataclass(frozen=True)
class Device:
    """All that differs between a GPU and a rehearsal without one."""

    xp: ModuleType
    ndimage: Any
    backends: dict[str, Backend]  # the CPU first: the others have to say what it says
    peers: dict[str, Callable[[Array], Array]]  # from a volume's foreground to its labels
    missing: dict[str, str]  # what cannot be imported, and why
    elapsed: Elapsed  # of work on the device
    free: Callable[[], None]  # hands unused memory back
    compiler: Compiler | None = None  # of the kernels; None: there are none here
    kernels: Callable[..., KernelVerbs] = KernelVerbs  # of `xp`, a compiler, threads and items
    now: Callable[[], Any] = time.perf_counter  # a mark among the work on the device
    seconds: Callable[[Any, Any], float] = lambda start, end: end - start  # between two marks
    name: str = "cuda"  # of the backend that other processes are to use


def wall_clock(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call took on the host, and its result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def cuda_device() -> Device:
    """Return the current CUDA device; raise `BackendUnavailableError` where there is none."""

    def with_kernels(choice: str) -> Backend:
        with mock.patch.dict(os.environ, {cuda.ENVIRONMENT_VARIABLE: choice}):
            return cuda.load()

    backends = {CPU: get_backend("cpu"), OWN: with_kernels("own"), CUPY: with_kernels("library")}
    import cupy
    from cupyx.scipy import ndimage

    def mark() -> Any:
        event = cupy.cuda.Event()
        event.record()
        return event

    def by_events(work: Callable[[], Any]) -> tuple[float, Any]:
        cupy.cuda.get_current_stream().synchronize()
        start = mark()
        result = work()
        end = mark()
        end.synchronize()
        return cupy.cuda.get_elapsed_time(start, end) / 1e3, result

    peers, missing = find_peers(lambda mask: ndimage.label(mask)[0])
    return Device(
        cupy,
        ndimage,
        backends,
        peers,
        missing,
        by_events,
        free=cupy.get_default_memory_pool().free_all_blocks,
        compiler=lambda code, options: cupy.RawModule(code=code, options=options),
        now=mark,
        seconds=lambda start, end: cupy.cuda.get_elapsed_time(start, end) / 1e3,
    )


def find_peers(label: Callable[[Array], Array]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the functions that label one volume, and what cannot be imported here."""
    absent = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    missing = dict.fromkeys(absent, "not installed")
    peers = {CUPY_SINGLY: label}
    try:
        measure = importlib.import_module("cucim.skimage.measure")
        peers[CUCIM_SINGLY] = partial(measure.label, connectivity=1)
    except Exception as error:  # a broken installation raises whatever it trips over
        missing["cucim"] = reason_of(error)
    return peers, missing


def reason_of(error: BaseException) -> str:
    """Return what an error says, in a line and without paths of this machine."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return without_paths(f"{type(error).__name__}: {first}")[:300]


def without_paths(text: str) -> str:
    """Return a text that says nothing of where things lie on this machine."""
    return _PATH.sub("<path>", text)

"""Each kernel alone, and in blocks of other sizes: where a verb that is too slow loses its time."""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import Any

from benchmarks.gpu.device import Device
from benchmarks.gpu.records import Run, times_of
from benchmarks.gpu.stages import VERBS, in_pieces
from benchmarks.gpu.work import Batch, Case
from gpuroi.backends._kernels import Kernel, Module

#: Threads a block and voxels a thread that might be faster than what the kernels have.
BLOCKS = ((256, 8), (128, 16), (512, 8))

REPEATS = 5


class Stopwatch:
    """A compiler whose kernels leave the marks between which they ran."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._launches: list[tuple[str, Any, Any]] = []

    def __call__(self, code: str, options: tuple[str, ...]) -> Module:
        """Return a compiled module whose kernels are timed."""
        assert self._device.compiler is not None
        module: Any = SimpleNamespace()
        module.get_function = partial(self._timed, self._device.compiler(code, options))
        return module

    def _timed(self, module: Module, name: str) -> Kernel:
        kernel, now = module.get_function(name), self._device.now

        def launch(*arguments: Any) -> None:
            start = now()
            kernel(*arguments)
            self._launches.append((name, start, now()))

        return launch

    def take(self) -> dict[str, list[float]]:
        """Return the seconds of all launches since the last call, by kernel, once they are done."""
        seconds = defaultdict(list)
        for name, start, end in self._launches:
            seconds[name].append(self._device.seconds(start, end))
        self._launches.clear()
        return seconds


def time_kernels(run: Run, case: Case, name: str, batch: Batch) -> None:
    """Add a record for each kernel of a stage; apart from contenders, whom marks would slow."""
    watch = Stopwatch(run.device)
    verbs = run.device.kernels(run.device.xp, watch)

    def measured() -> None:
        work = partial(VERBS[name].run, verbs, batch)
        run.device.elapsed(work)  # compiles
        watch.take()
        totals: dict[str, list[float]] = defaultdict(list)
        for _ in range(REPEATS):
            run.device.elapsed(work)
            launches = watch.take()
            for kernel, seconds in launches.items():
                totals[kernel].append(sum(seconds))
        for kernel, seconds in totals.items():
            times = times_of(seconds, len(batch.maps)) | {"launches": len(launches[kernel])}
            run.add(**case.record(), stage=name, contender=f"  {kernel}", **times)

    run.attempt(measured, **case.record(), stage=name, contender="its kernels")


def try_blocks(run: Run, case: Case, name: str, batch: Batch, known: dict[int, Any]) -> None:
    """Time a stage by kernels in blocks of other sizes; `known` is what they have to say."""
    for threads, items in BLOCKS:
        verbs = run.device.kernels(run.device.xp, run.device.compiler, threads, items)
        work = partial(in_pieces, run, verbs, VERBS[name], batch, known)
        run.attempt(work, **case.record(), stage=name, contender=f"own, {threads} x {items}")

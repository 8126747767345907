"""Each verb on a batch: by every contender, compared map by map, and timed."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.gpu.device import CPU, CUPY, wall_clock
from benchmarks.gpu.records import Run, repeat, times_of
from benchmarks.gpu.work import SEED_DISTANCE_VOXELS, SEED_FLOOR, Batch, Case, every_nth
from gpuroi.algorithms.threshold import one_sided
from gpuroi.backends import Backend, LabelledVoxels
from gpuroi.types import Array

CPU_MAPS = 8  # of a batch, for those that take map after map
_MAPS_AT_ONCE = 64  # while a batch is made of another: CuPy needs many times their memory


def _thresholded(backend: Backend, batch: Batch) -> Batch:
    maps = backend.xp.empty_like(batch.maps)
    for part in _parts(batch):
        (maps[part],) = one_sided(backend, batch.maps[part], batch.cutoffs[part], "positive")
    return replace(batch, maps=maps)


def _smoothed(backend: Backend, batch: Batch) -> Batch:
    maps = backend.xp.empty_like(batch.maps)
    for part in _parts(batch):
        maps[part] = backend.smooth(batch.maps[part], batch.sigma_voxels)
    highest = backend.to_host(maps.max(axis=(1, 2, 3)))
    return replace(batch, maps=maps, floors=highest * highest.dtype.type(SEED_FLOOR))


def _parts(batch: Batch) -> list[slice]:
    return [slice(b, b + _MAPS_AT_ONCE) for b in range(0, len(batch.maps), _MAPS_AT_ONCE)]


def _regions(verb: str) -> Callable[[Any, Batch], Any]:
    return lambda to, b: getattr(to, verb)(b.maps, b.cutoffs, "both", 6, b.min_voxels)


@dataclass(frozen=True)
class Stage:
    """A verb on a batch; `prepare` makes its maps of those of the stage before."""

    bytes_per_voxel: int  # the least that has to be moved
    run: Callable[[Any, Batch], Any]
    prepare: Callable[[Backend, Batch], Batch] = lambda _, batch: batch


VERBS = {
    "order_statistics": Stage(12, lambda to, b: to.order_statistics(b.maps, b.ranks, True, None)),
    "components": Stage(24, _regions("components")),
    "component_voxels": Stage(24, _regions("component_voxels")),
    "smooth": Stage(24, lambda to, b: to.smooth(b.maps, b.sigma_voxels), _thresholded),
    "local_maxima": Stage(
        8, lambda to, b: to.local_maxima(b.maps, SEED_DISTANCE_VOXELS, b.floors), _smoothed
    ),
}


def prepare(run: Run, case: Case, name: str, batch: Batch) -> Batch | None:
    """Return the maps of a stage, made of those before by CuPy; None if it fails, which is told."""
    prepared = []

    def work() -> None:
        prepared.append(VERBS[name].prepare(run.device.backends[CUPY], batch))

    run.attempt(work, **case.record(), stage=name, contender="preparation")
    return prepared[0] if prepared else None


def compete(run: Run, case: Case, name: str, batch: Batch) -> dict[int, Any]:
    """Time a stage by every contender and compare them; return what was first said of volumes."""
    known: dict[int, Any] = {}
    for contender, backend in run.device.backends.items():
        work = partial(in_pieces, run, backend, VERBS[name], batch, known)
        run.attempt(work, **case.record(), stage=name, contender=contender)
    return known


def in_pieces(
    run: Run, backend: Any, stage: Stage, batch: Batch, known: dict[int, Any]
) -> dict[str, Any]:
    """Return the measurement of a contender, on halves of the batch where memory demands it."""
    n_maps = size = len(batch.maps)
    if backend is run.device.backends[CPU]:
        parts = [range(b, b + 1) for b in every_nth(n_maps, CPU_MAPS)]
        return _measured(run, backend, stage, batch, known, parts)
    while True:
        parts = [range(b, min(b + size, n_maps)) for b in range(0, n_maps, size)]
        try:
            return _measured(run, backend, stage, batch, known, parts)
        except MemoryError:
            if size == 1:
                raise
        run.device.free()
        size = math.ceil(size / 2)


def _measured(
    run: Run,
    backend: Any,
    stage: Stage,
    batch: Batch,
    known: dict[int, Any],
    parts: list[range],
) -> dict[str, Any]:
    """Compare what is said of `parts` of a batch, then time that; `known` gets what is new."""
    on_host = backend is run.device.backends[CPU]
    elapsed = wall_clock if on_host else run.device.elapsed
    inputs = [batch.of(volumes) for volumes in parts]
    if on_host:
        inputs = [replace(i, maps=run.device.backends[CUPY].to_host(i.maps)) for i in inputs]
    works = [partial(stage.run, backend, part) for part in inputs]
    new: dict[int, Any] = {}
    first_s, n_compared, wrong = 0.0, 0, []
    for volumes, work in zip(parts, works, strict=True):
        seconds, result = elapsed(work)  # compiles, too
        first_s += seconds
        for k, b in enumerate(volumes):
            said = tuple(r[k] for r in result) if isinstance(result, tuple) else result[k]
            if b not in known:
                new[b] = said
                continue
            n_compared += 1
            if not identical(said, known[b]):
                wrong.append(b)
        del result, said
    times = times_of(repeat(elapsed, works, *[first_s] * on_host), sum(map(len, parts)))
    known |= new
    bytes_s = stage.bytes_per_voxel * math.prod(batch.maps.shape[1:]) * times["maps_per_s"]
    if run.copy_bytes_s is not None and not on_host:
        times["share_of_copy"] = bytes_s / run.copy_bytes_s
    if n_compared > 0:
        times["identical"] = not wrong
    more = {"compared_maps": n_compared, "differing_maps": wrong[:10], "pieces": len(parts)}
    return times | more | {"bytes_per_voxel": stage.bytes_per_voxel}


def identical(one: Any, other: Any) -> bool:
    """Return whether two results have the same shapes, dtypes and bits, wherever they lie."""
    if isinstance(one, LabelledVoxels):
        one, other = ([v.index, v.label, np.array(v.n_regions)] for v in (one, other))
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(identical, one, other))
    if type(one) is not type(other):
        one, other = _on_host(one), _on_host(other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype.kind == "f":
        one, other = (array.view(f"i{array.dtype.itemsize}") for array in (one, other))
    return bool(_on_host((one == other).all()))


def _on_host(array: Array) -> Any:
    return array.get() if hasattr(array, "get") else array

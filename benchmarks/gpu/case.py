"""A case: one batch through all its stages."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.gpu.device import CUCIM_SINGLY, CUPY, CUPY_SINGLY, OWN, Device
from benchmarks.gpu.kernels import time_kernels, try_blocks
from benchmarks.gpu.records import Run, repeat, times_of
from benchmarks.gpu.stages import compete, identical, prepare
from benchmarks.gpu.work import CASES, Batch, Case, every_nth, make_batch
from gpuroi.types import Array, FloatArray

COPIED_BYTES, TINY_BYTES = 2**32, 2**20
PEER_MAPS = 32  # of a batch, for libraries that take map after map


def run_case(run: Run, case: Case, is_quick: bool = False) -> None:
    """Send one batch through the stages of its case."""
    work = partial(measure_copy, run, TINY_BYTES if is_quick else COPIED_BYTES)
    run.attempt(work, **case.record() | {"maps": 1}, stage="copy", contender="on the device")
    batch = make_batch(run.device, case)
    for name in case.stages:
        prepared = prepare(run, case, name, batch)
        if prepared is None:
            continue
        batch = prepared
        known = compete(run, case, name, batch)
        if case.name == CASES[0].name and run.device.compiler is not None:
            time_kernels(run, case, name, batch)
            if name == "components":
                try_blocks(run, case, name, batch, known)
        del known
        if name == "components":
            record = case.record() | {"stage": "labels", "contender": "-"}
            run.attempt(partial(label_one_by_one, run, case, batch), **record)


def measure_copy(run: Run, n_bytes: int) -> dict[str, Any]:
    """Measure the bytes that a copy on the device reads and writes a second."""
    source = run.device.xp.zeros(n_bytes // 4, np.float32)
    copy = partial(run.device.xp.copyto, run.device.xp.empty_like(source), source)
    copy()
    times = times_of(repeat(run.device.elapsed, [copy]), 1)
    run.copy_bytes_s = 2 * n_bytes / times["median_s"]
    return times | {"bytes": n_bytes, "bytes_per_s": run.copy_bytes_s}


def label_one_by_one(run: Run, case: Case, batch: Batch) -> None:
    """Time libraries that label one volume a call: no threshold, no second sign, no size filter."""
    device = run.device
    part = batch.of(every_nth(case.n_maps, PEER_MAPS))
    maps = device.xp.ascontiguousarray(part.maps)
    expected = _labels(device, maps, part.cutoffs)
    foreground = list(maps >= device.xp.asarray(part.cutoffs).reshape(-1, 1, 1, 1))

    def measured(label: Callable[[Array], Array]) -> dict[str, Any]:
        found = [label(mask).astype(np.int32) for mask in foreground]
        outcome = {"identical": identical(found, list(expected)), "compared_maps": len(found)}
        del found
        times = repeat(device.elapsed, [lambda: [label(mask) for mask in foreground]])
        return times_of(times, len(foreground)) | outcome

    for name in (CUPY_SINGLY, CUCIM_SINGLY):
        record = case.record() | {"stage": "labels", "contender": name}
        if name in device.peers:
            run.attempt(partial(measured, device.peers[name]), **record)
        else:
            run.add(**record, skipped=device.missing["cucim"])


def _labels(device: Device, maps: Array, cutoffs: FloatArray) -> Array:
    """Return the labels of all positive components, by the kernels if they work."""
    try:
        return device.backends[OWN].components(maps, cutoffs, "positive", 6, 1)[0]
    except Exception:  # which is on record; the libraries are compared with each other then
        return device.backends[CUPY].components(maps, cutoffs, "positive", 6, 1)[0]

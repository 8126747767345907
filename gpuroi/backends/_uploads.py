"""Copies to a CUDA device that run beside its kernels."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuroi.types import Array


@dataclass
class _Lane:
    """A device's stream for copies, and two buffers of pinned memory to copy from."""

    stream: Any
    buffers: list[NDArray[np.uint8]] = field(default_factory=lambda: [np.empty(0, np.uint8)] * 2)
    copied: list[Any] = field(default_factory=lambda: [None, None])
    turn: int = 0


class PinnedUploads:
    """Copies through two pinned buffers in turn, on a stream of their own.

    Only from pinned memory does a copy run while kernels do; with two buffers the host fills one
    while the device reads the other.
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._lanes: dict[int, _Lane] = {}

    def __call__(self, host: NDArray[np.generic]) -> Callable[[], Array]:
        """Begin to copy `host`; see `gpuroi.backends.Backend.upload`."""
        cupy = self._cupy
        lane = self._lane()
        with lane.stream:  # or memory that is given back before its copy is done could be reused
            device = cupy.empty(host.shape, host.dtype)
        turn = lane.turn = 1 - lane.turn
        if lane.copied[turn] is not None:
            lane.copied[turn].synchronize()  # waits for a copy, not for kernels
        try:
            staged = self._buffer(lane, turn, host.nbytes).view(host.dtype).reshape(host.shape)
        except cupy.cuda.runtime.CUDARuntimeError:
            device.set(np.ascontiguousarray(host))  # as much cannot be pinned here; waits
            return lambda: device
        staged[...] = host
        # The memory may have been an array's whose kernels are still queued.
        lane.stream.wait_event(cupy.cuda.get_current_stream().record())
        device.set(staged, stream=lane.stream)
        copied = lane.copied[turn] = lane.stream.record()
        held = [device]

        def arrived() -> Array:
            cupy.cuda.get_current_stream().wait_event(copied)
            return held.pop()  # not kept: the caller may have to free it

        return arrived

    def _lane(self) -> _Lane:
        device = self._cupy.cuda.Device().id
        if device not in self._lanes:
            self._lanes[device] = _Lane(self._cupy.cuda.Stream(non_blocking=True))
        return self._lanes[device]

    def _buffer(self, lane: _Lane, turn: int, n_bytes: int) -> NDArray[np.uint8]:
        """Return `n_bytes` of this turn's pinned buffer, a larger one if need be."""
        if lane.buffers[turn].size < n_bytes:
            lane.buffers[turn] = np.empty(0, np.uint8)  # the old one is freed first
            memory = self._cupy.cuda.alloc_pinned_memory(n_bytes)
            lane.buffers[turn] = np.frombuffer(memory, np.uint8, n_bytes)
        return lane.buffers[turn][:n_bytes]

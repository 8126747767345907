"""Copies to a CUDA device that run beside its kernels."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gpuroi.backends import Staging
from gpuroi.types import Array

# Of one device, of which the host may run ahead.
_MOST_COPIES = 4


@dataclass
class _Lane:
    """A device's stream for copies, and what they still read: events, and memory of the host."""

    stream: Any
    copying: deque[tuple[Any, NDArray[Any]]] = field(default_factory=deque)


class PinnedUploads:
    """Copies from pinned memory, on a stream of their own: only so does a copy run beside kernels.

    CuPy keeps pinned memory that nobody uses any more for the next who asks for as much.
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._lanes: dict[int, _Lane] = {}

    def __call__(self, host: NDArray[np.generic]) -> Callable[[], Array]:
        """Begin to copy `host`, which may change at once; return what gives the device's array."""
        staged, send = self._staged(host.shape, host.dtype)
        staged[...] = host
        return send(staged)

    def staging(self, shape: tuple[int, int, int, int], dtype: DTypeLike) -> Staging:
        """See `gpuroi.backends.Backend.staging`: the device turns what lies as in files."""
        n_volumes, x, y, z = shape
        staged, send = self._staged((n_volumes, z, y, x), np.dtype(dtype))

        def send_first(n: int) -> Callable[[], Array]:
            arrived = send(staged[:n])
            return lambda: self._cupy.ascontiguousarray(arrived().transpose(0, 3, 2, 1))

        return Staging(staged.transpose(0, 3, 2, 1), send_first)

    def _staged(
        self, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> tuple[NDArray[Any], Callable[[NDArray[Any]], Callable[[], Array]]]:
        """Return an array to be filled, and what begins to copy a part of it."""
        cupy, lane = self._cupy, self._lane()
        while lane.copying and (len(lane.copying) >= _MOST_COPIES or lane.copying[0][0].done):
            lane.copying.popleft()[0].synchronize()  # waits for a copy, not for kernels
        n_bytes = int(np.prod(shape)) * dtype.itemsize
        # By powers of two: maps of many sizes would each leave memory of their own behind.
        n_pinned = 1 << max(0, n_bytes - 1).bit_length()
        try:
            memory = cupy.cuda.alloc_pinned_memory(n_pinned)
        except cupy.cuda.runtime.CUDARuntimeError:
            memory = bytearray(n_bytes)  # as much cannot be pinned: the host waits while it is read
        whole = np.frombuffer(memory, np.uint8, n_bytes).view(dtype).reshape(shape)

        def send(staged: NDArray[Any]) -> Callable[[], Array]:
            with lane.stream:  # or memory given back before its copy is done could be reused
                device = cupy.empty(staged.shape, staged.dtype)
            held = [device]
            # The memory may have been an array's whose kernels are still queued.
            lane.stream.wait_event(cupy.cuda.get_current_stream().record())
            device.set(staged, stream=lane.stream)
            copied = lane.stream.record()
            lane.copying.append((copied, staged))

            def arrived() -> Array:
                cupy.cuda.get_current_stream().wait_event(copied)
                return held.pop()  # not kept: the caller may have to free it

            return arrived

        return whole, send

    def _lane(self) -> _Lane:
        device = self._cupy.cuda.Device().id
        if device not in self._lanes:
            self._lanes[device] = _Lane(self._cupy.cuda.Stream(non_blocking=True))
        return self._lanes[device]

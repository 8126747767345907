"""What to do when a batch does not fit into the memory of a device."""

from collections.abc import Callable
from typing import Any, TypeVar

from numpy.typing import NDArray

from gpuroi.backends import Backend
from gpuroi.errors import DeviceMemoryError

_T = TypeVar("_T")


def in_pieces(
    backend: Backend, host: NDArray[Any], step: Callable[[NDArray[Any]], list[_T]]
) -> list[_T]:
    """Return ``step(host)``, put together from halves of the batch where the device is too small.

    Raises
    ------
    DeviceMemoryError
        If a single volume does not fit.
    """
    try:
        return step(host)
    except MemoryError as error:
        if len(host) == 1:
            advice = "use a machine with more memory"
            if backend.name != "cpu":
                advice = "pass backend='cpu', or free the memory that other processes hold"
            raise DeviceMemoryError(
                f"one volume of shape {host.shape[1:]} ({host.nbytes / 2**20:.0f} MiB as "
                f"{host.dtype}) does not fit on {backend.device}: {error or 'out of memory'}; "
                f"{advice}."
            ) from error
    half = len(host) // 2
    return in_pieces(backend, host[:half], step) + in_pieces(backend, host[half:], step)

"""The CUDA backend: each verb by CuPy or by a kernel of our own, whichever has proven itself.

A library call is the first version of every verb. A kernel takes its place in `PROVEN` when a
recorded run on a GPU has shown it identical and faster; docs/cuda.md names the record. Until then
``GPUROI_CUDA_KERNELS=own`` chooses the kernels, and ``library`` chooses CuPy for every verb.
"""

import importlib.metadata
import os
from collections.abc import Callable, Mapping
from functools import cache
from itertools import islice
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gpuroi.backends import LabelledVoxels, Staging
from gpuroi.backends._kernels import KernelVerbs
from gpuroi.backends._library import LibraryVerbs
from gpuroi.backends._uploads import PinnedUploads
from gpuroi.errors import BackendUnavailableError, DeviceFullError, UnknownBackendError
from gpuroi.types import Array, Connectivity, FloatArray, Tail

ENVIRONMENT_VARIABLE = "GPUROI_CUDA_KERNELS"

VERBS = ("order_statistics", "components", "smooth", "local_maxima")

#: The verbs whose kernels a recorded run on a GPU has shown identical and faster: none so far.
PROVEN: frozenset[str] = frozenset()

# 18 maps at 2 mm: enough work for every launch, and little for the end of a series to wait for.
_MOST_BATCH_BYTES = 64 * 2**20
# The library's verbs need up to this many times the memory of the maps.
_BYTES_A_BYTE = 24

_EXTRA = "pip install 'gpuroi[cuda13]' (or 'gpuroi[cuda12]' for a driver of CUDA 12)"


def load() -> "CudaBackend":
    """Return the CUDA backend after a kernel was compiled and run on the current device."""
    try:
        import cupy
        import cupyx.scipy.ndimage
    except ImportError as error:
        raise BackendUnavailableError(f"CuPy cannot be imported ({error}); {_EXTRA}.") from error
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendUnavailableError(
            f"CuPy {cupy.__version__} finds no usable CUDA device ({error}); "
            "check the driver with nvidia-smi."
        ) from error
    try:
        computed = int(cupy.arange(4, dtype=cupy.int32).sum())  # waits
    except Exception as error:  # a broken toolkit raises whatever its broken part raises
        # Refused to CuPy's pool, or to the driver, which needs some for itself.
        if isinstance(error, MemoryError) or "cudaErrorMemoryAllocation" in str(error):
            raise DeviceFullError(
                f"the CUDA device has no memory left for a first kernel ({error}); free what other "
                "processes hold, which nvidia-smi lists, or pass backend='cpu'."
            ) from error
        raise BackendUnavailableError(
            f"CuPy {cupy.__version__} sees a CUDA device but cannot compile and run a kernel "
            f"({type(error).__name__}: {error}); {_EXTRA}, whose 'ctk' parts bring the compiler."
        ) from error
    if computed != 6:
        raise BackendUnavailableError(
            f"the CUDA device computed 0+1+2+3 = {computed}; it is faulty."
        )

    @cache  # a series of maps asks again and again, and the driver takes its time
    def name_of(device: int) -> str:
        name: bytes = cupy.cuda.runtime.getDeviceProperties(device)["name"]
        return name.decode()

    packages = {
        "cupy": cupy.__version__,
        "cuda-runtime": str(cupy.cuda.runtime.runtimeGetVersion()),
        "cuda-driver": str(cupy.cuda.runtime.driverGetVersion()),
    }
    library = LibraryVerbs(cupy, cupyx.scipy.ndimage)
    kernels = KernelVerbs(cupy, lambda code, options: cupy.RawModule(code=code, options=options))
    return CudaBackend(
        cupy,
        {verb: kernels if verb in chosen_kernels() else library for verb in VERBS},
        device=lambda: name_of(cupy.cuda.Device().id),
        packages=packages,
        uploads=PinnedUploads(cupy),
        free_bytes=lambda: _free_bytes(cupy),
    )


def chosen_kernels() -> frozenset[str]:
    """Return the verbs for which the environment, or the record, chooses kernels of our own."""
    choice = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if choice == "":
        return PROVEN
    if choice == "own":
        return frozenset(VERBS)
    if choice == "library":
        return frozenset()
    raise UnknownBackendError(  # which "auto" does not pass over in silence
        f"{ENVIRONMENT_VARIABLE}={choice!r} is neither 'own' nor 'library'; leave it unset for "
        "the default."
    )


def _free_bytes(cupy: ModuleType) -> int:
    """Return the memory that new arrays can have: what the device and CuPy's pool hold free."""
    free, _ = cupy.cuda.Device().mem_info
    return int(free + cupy.get_default_memory_pool().free_bytes())


def environments() -> list[dict[str, str]]:
    """Return for each device that is visible the variables with which a process sees it alone."""
    import cupy

    n_devices = cupy.cuda.runtime.getDeviceCount()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = chosen.split(",") if chosen else map(str, range(n_devices))
    return [{"CUDA_VISIBLE_DEVICES": name.strip()} for name in islice(names, n_devices)]


class Uploads(Protocol):
    """Copies to the device, as `PinnedUploads` makes them."""

    def __call__(self, host: NDArray[np.generic]) -> Callable[[], Array]:
        """Begin to copy `host`, and return a function that gives the device's array."""

    def staging(self, shape: tuple[int, int, int, int], dtype: DTypeLike) -> Staging:
        """See `gpuroi.backends.Backend.staging`."""


class CudaBackend:
    """Every verb on the whole batch, by the object that `verbs` names for it.

    Parameters
    ----------
    xp : module
        CuPy; or NumPy in the tests of machines without a GPU.
    verbs : mapping
        `LibraryVerbs` or `KernelVerbs` for each of `VERBS`.
    device : str or callable
        What hardware; a function says it of the device that is current.
    packages : mapping
        Versions that decide the result, besides NumPy's and SciPy's.
    uploads : Uploads
        Copies what lies on the host.
    free_bytes : callable
        Says how much memory is free.
    """

    name = "cuda"

    def __init__(
        self,
        xp: ModuleType,
        verbs: Mapping[str, "LibraryVerbs | KernelVerbs"],
        *,
        device: str | Callable[[], str],
        packages: Mapping[str, str],
        uploads: Uploads,
        free_bytes: Callable[[], int],
    ) -> None:
        self.xp = xp
        self._device = device
        self._verbs = verbs
        self._uploads = uploads
        self._free_bytes = free_bytes
        by_kernels = [verb for verb in VERBS if isinstance(verbs[verb], KernelVerbs)]
        self._versions = {
            **packages,
            **{package: importlib.metadata.version(package) for package in ("numpy", "scipy")},
            "cuda-kernels": ", ".join(by_kernels) or "none: CuPy for every verb",
        }

    @property
    def device(self) -> str:
        """See `gpuroi.backends.Backend`."""
        return self._device if isinstance(self._device, str) else self._device()

    @property
    def batch_bytes(self) -> int:
        """See `gpuroi.backends.Backend.batch_bytes`."""
        return min(_MOST_BATCH_BYTES, max(1, self._free_bytes() // _BYTES_A_BYTE))

    def versions(self) -> dict[str, str]:
        """See `gpuroi.backends.Backend.versions`."""
        return self._versions

    def staging(self, shape: tuple[int, int, int, int], dtype: DTypeLike) -> Staging:
        """See `gpuroi.backends.Backend.staging`."""
        return self._uploads.staging(shape, dtype)

    def to_device(self, host: NDArray[np.generic]) -> Array:
        """See `gpuroi.backends.Backend.to_device`."""
        return self._uploads(host)()

    def to_host(self, array: Array) -> Any:
        """See `gpuroi.backends.Backend.to_host`."""
        return array.get() if hasattr(array, "get") else array  # waits

    def order_statistics(
        self,
        maps: Array,
        ranks: NDArray[np.int64],
        absolute: bool,
        population: Array | None,
    ) -> FloatArray:
        """See `gpuroi.backends.Backend.order_statistics`."""
        verbs = self._verbs["order_statistics"]
        return verbs.order_statistics(maps, ranks, absolute, population)

    def components(
        self,
        maps: Array,
        cutoffs: FloatArray,
        tail: Tail,
        connectivity: Connectivity,
        min_voxels: int,
    ) -> tuple[Array, Array]:
        """See `gpuroi.backends.Backend.components`."""
        verbs = self._verbs["components"]
        return verbs.components(maps, cutoffs, tail, connectivity, min_voxels)

    def component_voxels(
        self,
        maps: Array,
        cutoffs: FloatArray,
        tail: Tail,
        connectivity: Connectivity,
        min_voxels: int,
    ) -> list[LabelledVoxels]:
        """See `gpuroi.backends.Backend.component_voxels`."""
        verbs = self._verbs["components"]
        return verbs.component_voxels(maps, cutoffs, tail, connectivity, min_voxels)

    def smooth(self, maps: Array, sigma_voxels: tuple[float, float, float]) -> Array:
        """See `gpuroi.backends.Backend.smooth`."""
        return self._verbs["smooth"].smooth(maps, sigma_voxels)

    def local_maxima(self, maps: Array, distance: int, floors: FloatArray) -> Array:
        """See `gpuroi.backends.Backend.local_maxima`."""
        return self._verbs["local_maxima"].local_maxima(maps, distance, floors)

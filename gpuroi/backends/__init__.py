"""The backend protocol, and how a backend is found and chosen.

A backend is one module in this folder with a function ``load()`` that returns an object with the
verbs of `Backend`, or raises `BackendUnavailableError` with the reason. It must pass
`gpuroi.testing.BackendContract`. A module whose name starts with an underscore is a part of others.
"""

import importlib
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from gpuroi.errors import BackendUnavailableError, UnknownBackendError
from gpuroi.types import Array, Connectivity, FloatArray, Tail

#: What ``auto`` tries, best first.
PREFERENCE = ("cuda", "cpu")

ENVIRONMENT_VARIABLE = "GPUROI_BACKEND"


@dataclass(frozen=True)
class LabelledVoxels:
    """The voxels of one volume's regions, in C order."""

    index: NDArray[np.int64]  # flat
    label: NDArray[np.int32]  # 1..n_regions
    n_regions: int


class Backend(Protocol):
    """Five verbs and three doors: all that differs between a CPU and a GPU.

    `maps` are a batch of volumes ``(B, X, Y, Z)``: finite values, float32 or float64, C-contiguous,
    native byte order, in the backend's own memory. Every backend returns the same bits.
    """

    name: str
    device: str
    xp: ModuleType
    batch_bytes: int  # how much of a series of maps it likes to be given at once

    def versions(self) -> dict[str, str]:
        """Return the versions of the libraries that decide the result, by package name."""

    def to_device(self, host: NDArray[np.generic]) -> Array:
        """Return `host` as a C-contiguous array of this backend."""

    def upload(self, host: NDArray[np.generic]) -> Callable[[], Array]:
        """Begin to copy `host`, and return a function that gives what `to_device` would.

        To be called once, when the array is needed: until then the device does other work. `host`
        may change meanwhile.
        """

    def to_host(self, array: Array) -> Any:
        """Return `array` as a NumPy array, waiting until it has been computed."""

    def order_statistics(
        self,
        maps: Array,
        ranks: NDArray[np.int64],
        absolute: bool,
        population: Array | None,
    ) -> FloatArray:
        """Return the values at `ranks` ``(B, k)`` of each sorted volume, exactly, on the host.

        With `absolute`, magnitudes are sorted. `population` is a boolean array ``(B, X, Y, Z)`` of
        the voxels that take part (None: all); each rank lies below its volume's population.
        """

    def components(
        self,
        maps: Array,
        cutoffs: FloatArray,
        tail: Tail,
        connectivity: Connectivity,
        min_voxels: int,
    ) -> tuple[Array, Array]:
        """Return labels ``(B, X, Y, Z)`` int32 and the number of regions ``(B,)`` int32.

        Foreground is ``x >= cutoff`` (positive), ``x <= -cutoff`` (negative) or both, without
        joining the two signs. `cutoffs` ``(B,)`` live on the host, are above zero and of the maps'
        dtype. Regions with fewer than `min_voxels` voxels are background; the others are numbered
        1..n by their first voxel in C order.
        """

    def component_voxels(
        self,
        maps: Array,
        cutoffs: FloatArray,
        tail: Tail,
        connectivity: Connectivity,
        min_voxels: int,
    ) -> list[LabelledVoxels]:
        """Return the labelled voxels of `components`, volume by volume, on the host.

        A few percent of a volume at most thresholds: less to copy, and less to walk through.
        """

    def smooth(self, maps: Array, sigma_voxels: tuple[float, float, float]) -> Array:
        """Return `maps` after a Gaussian along each axis in turn, reflecting at the borders.

        Equals `scipy.ndimage.gaussian_filter1d` chained over the axes bit for bit: sums in
        float64 in SciPy's order, rounded to the maps' dtype after each axis.
        """

    def local_maxima(self, maps: Array, distance: int, floors: FloatArray) -> Array:
        """Return seeds ``(B, X, Y, Z)`` int32: where a voxel is the maximum of its window.

        The window reaches `distance` voxels to each side and ends at the border. A maximum exceeds
        its volume's entry of `floors` ``(B,)``, zero or more. Touching maxima of one plateau
        (6-connected) share a seed; seeds are numbered 1..n in C order.
        """


@cache
def names() -> tuple[str, ...]:
    """Return the names of all backends of this installation, runnable or not."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in modules if not name.startswith("_")))


@cache
def _load(name: str) -> Backend:
    module = importlib.import_module(f"{__name__}.{name}")
    return cast(Backend, module.load())


def environments(name: str) -> list[dict[str, str]]:
    """Return for each device of a backend the variables with which a process sees it alone."""
    module = importlib.import_module(f"{__name__}.{name}")
    return module.environments() if hasattr(module, "environments") else [{}]


def available_backends() -> dict[str, str | None]:
    """Return each backend's name with None if it can run here, else with the reason why not.

    Examples
    --------
    >>> import gpuroi
    >>> gpuroi.available_backends()["cpu"] is None
    True
    """
    reasons: dict[str, str | None] = {}
    for name in names():
        try:
            _load(name)
        except (BackendUnavailableError, UnknownBackendError) as reason:
            reasons[name] = str(reason)
        else:
            reasons[name] = None
    return reasons


def get_backend(backend: str | Backend = "auto") -> Backend:
    """Return the backend of that name; an instance is returned as it is.

    Parameters
    ----------
    backend : {"auto", "cpu", "cuda"} or Backend
        ``"auto"`` follows the environment variable ``GPUROI_BACKEND`` where it is set, and takes
        the first of `PREFERENCE` that can run otherwise. Only ``auto`` ever falls back.

    Raises
    ------
    UnknownBackendError
        If no backend has that name.
    BackendUnavailableError
        If the backend was named and cannot run here.
    """
    if not isinstance(backend, str):
        if hasattr(backend, "component_voxels"):
            return backend
        raise TypeError(
            f"backend={backend!r} is not a backend; pass 'auto', one of {names()}, or an object "
            "with the verbs of gpuroi.backends.Backend."
        )
    name, origin = backend, "backend="
    if name == "auto":
        name, origin = os.environ.get(ENVIRONMENT_VARIABLE) or "auto", f"{ENVIRONMENT_VARIABLE}="
    if name != "auto":
        if name not in names():
            raise UnknownBackendError(
                f"{origin}{name!r} is unknown; gpuroi has {', '.join(names())} and 'auto'."
            )
        return _load(name)
    reasons = []
    for candidate in PREFERENCE:
        try:
            return _load(candidate)
        except BackendUnavailableError as reason:
            reasons.append(f"{candidate}: {reason}")
    raise BackendUnavailableError("no backend can run here. " + " ".join(reasons))

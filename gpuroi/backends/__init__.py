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
from numpy.typing import DTypeLike, NDArray

from gpuroi.errors import BackendUnavailableError, DeviceFullError, UnknownBackendError, warn
from gpuroi.types import Array, Connectivity, FloatArray, Tail

#: What ``auto`` tries, best first.
PREFERENCE = ("cuda", "cpu")

ENVIRONMENT_VARIABLE = "GPUROI_BACKEND"


@dataclass(frozen=True)
class LabelledVoxels:
    """The voxels of one volume's regions, in C order.

    Attributes
    ----------
    index : int64 array (m,)
        Flat indices into the volume, ascending.
    label : int32 array (m,)
        The region of each voxel, 1..n_regions.
    n_regions : int
    """

    index: NDArray[np.int64]
    label: NDArray[np.int32]
    n_regions: int


@dataclass(frozen=True)
class Staging:
    """Memory of the host that a batch is put together in, on its way to a device.

    Attributes
    ----------
    host : array (B, X, Y, Z)
        To be filled, by several threads if there are. Volumes lie in it as they do in most files,
        x fastest, so that filling it turns nothing.
    send : callable
        ``send(n)`` begins to copy the first n volumes and returns a function that gives what
        `Backend.to_device` would: to be called once, when they are needed; until then the device
        does other work. It raises `MemoryError` where there is no room for them.
    """

    host: NDArray[Any]
    send: Callable[[int], Callable[[], Array]]


class Backend(Protocol):
    """Five verbs and three doors: all that differs between a CPU and a GPU.

    `maps` are a batch of volumes ``(B, X, Y, Z)``: finite values, float32 or float64, C-contiguous,
    native byte order, in the backend's own memory. Every backend returns the same bits. A verb
    whose arrays do not fit on the device raises `MemoryError`, or an error derived from it.

    Attributes
    ----------
    name : str
        What `get_backend` is asked for: the name of its module.
    device : str
        The hardware, in words for people; provenance keeps it.
    xp : module
        The namespace of its arrays, NumPy or CuPy: ``backend.xp.where(...)``.
    batch_bytes : int
        How much of a series of maps it likes to be given at once, in bytes; 1 is map by map.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuroi import get_backend
    >>> backend = get_backend("cpu")
    >>> maps = backend.to_device(np.array([[[[3.0, 0.0, 4.0, -4.0]]]]))
    >>> labels, counts = backend.components(maps, np.array([2.0]), "both", 6, 1)
    >>> backend.to_host(labels).ravel(), backend.to_host(counts)
    (array([1, 0, 2, 3], dtype=int32), array([3], dtype=int32))
    """

    name: str
    device: str
    xp: ModuleType
    batch_bytes: int

    def versions(self) -> dict[str, str]:
        """Return the versions of the libraries that decide the result.

        Returns
        -------
        dict
            Versions by package name, ``"numpy"`` among them.
        """

    def to_device(self, host: NDArray[np.generic]) -> Array:
        """Return `host` in the backend's own memory.

        Parameters
        ----------
        host : array of any shape and real dtype

        Returns
        -------
        array of `xp`, C-contiguous, of the shape and dtype of `host`
            The CPU backend returns `host` itself, in the memory layout that it has.
        """

    def staging(self, shape: tuple[int, int, int, int], dtype: DTypeLike) -> Staging:
        """Return memory to put a batch together in, from which the device copies it.

        Parameters
        ----------
        shape : four ints
            (B, X, Y, Z): B is the most volumes that will be sent.
        dtype : real dtype

        Returns
        -------
        Staging
        """

    def to_host(self, array: Array) -> Any:
        """Return `array` on the host, waiting until it has been computed.

        Parameters
        ----------
        array : array of `xp`

        Returns
        -------
        NumPy array of the same shape and dtype
        """

    def order_statistics(
        self,
        maps: Array,
        ranks: NDArray[np.int64],
        absolute: bool,
        population: Array | None,
    ) -> FloatArray:
        """Return the values at some ranks of each volume, exactly.

        Parameters
        ----------
        maps : batch
        ranks : int64 array (B, k) on the host
            Places among the sorted values from 0 on, ascending, each below its volume's population.
        absolute : bool
            Sort magnitudes instead of values.
        population : bool array (B, X, Y, Z), or None
            The voxels that take part; None is all of them.

        Returns
        -------
        NumPy array (B, k) of the dtype of `maps`
        """

    def components(
        self,
        maps: Array,
        cutoffs: FloatArray,
        tail: Tail,
        connectivity: Connectivity,
        min_voxels: int,
    ) -> tuple[Array, Array]:
        """Return the connected components of the foreground of each volume.

        Parameters
        ----------
        maps : batch
        cutoffs : array (B,) of the dtype of `maps`, on the host
            Above zero; infinity is reached by no voxel.
        tail : {"both", "positive", "negative"}
            Foreground is ``x >= cutoff`` (positive), ``x <= -cutoff`` (negative) or both, without
            joining the two signs.
        connectivity : {6, 18, 26}
            Neighbours that join: by faces, edges too, corners too.
        min_voxels : int
            Smaller regions are background.

        Returns
        -------
        labels : int32 array (B, X, Y, Z)
            0 is background; 1..n by first voxel in C order, in each volume.
        counts : int32 array (B,)
            n of each volume.
        """

    def component_voxels(
        self,
        maps: Array,
        cutoffs: FloatArray,
        tail: Tail,
        connectivity: Connectivity,
        min_voxels: int,
    ) -> list[LabelledVoxels]:
        """Return the labelled voxels of `components`, volume by volume.

        A few percent of a volume at most thresholds: less to copy, and less to walk through.

        Parameters
        ----------
        maps, cutoffs, tail, connectivity, min_voxels
            As in `components`.

        Returns
        -------
        list of LabelledVoxels, on the host
        """

    def smooth(self, maps: Array, sigma_voxels: tuple[float, float, float]) -> Array:
        """Return `maps` after a Gaussian along each axis in turn, reflecting at the borders.

        Equals `scipy.ndimage.gaussian_filter1d` chained over the axes bit for bit: sums in
        float64 in SciPy's order, rounded to the maps' dtype after each axis.

        Parameters
        ----------
        maps : batch
        sigma_voxels : three floats
            Standard deviations along x, y and z; 0 leaves that axis as it is.

        Returns
        -------
        array (B, X, Y, Z) of the dtype of `maps`
        """

    def local_maxima(self, maps: Array, distance: int, floors: FloatArray) -> Array:
        """Return seeds: voxels that are the maximum of the window around them.

        Parameters
        ----------
        maps : batch
        distance : int
            Voxels from the window's centre to each side; the window ends at the border.
        floors : array (B,) of the dtype of `maps`, on the host
            A maximum exceeds its volume's entry, which is zero or more.

        Returns
        -------
        int32 array (B, X, Y, Z)
            Seeds are numbered 1..n in C order; touching maxima of one plateau (6-connected) share
            one. 0 is elsewhere.
        """


@cache
def names() -> tuple[str, ...]:
    """Return the names of all backends of this installation, runnable or not.

    Returns
    -------
    tuple of str
        Sorted.

    Examples
    --------
    >>> from gpuroi import backends
    >>> backends.names()
    ('cpu', 'cuda')
    """
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in modules if not name.startswith("_")))


@cache
def _load(name: str) -> Backend:
    module = importlib.import_module(f"{__name__}.{name}")
    return cast(Backend, module.load())


def environments(name: str) -> list[dict[str, str]]:
    """Return for each device of a backend the variables with which a process sees it alone.

    Parameters
    ----------
    name : str
        One of `names`, that can run here.

    Returns
    -------
    list of dict
        One a device, such as ``{"CUDA_VISIBLE_DEVICES": "0"}``.

    Examples
    --------
    >>> from gpuroi import backends
    >>> backends.environments("cpu")
    [{}]
    """
    module = importlib.import_module(f"{__name__}.{name}")
    return module.environments() if hasattr(module, "environments") else [{}]


def available_backends() -> dict[str, str | None]:
    """Return each backend's name with None if it can run here, else with the reason why not.

    Returns
    -------
    dict
        Of str or None, in the order of the names.

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
        the first of `PREFERENCE` that can run otherwise. Only ``auto`` ever falls back; it warns
        of a device that is passed over because its memory is full.

    Returns
    -------
    Backend
        The same one for the same name: it is loaded once.

    Raises
    ------
    UnknownBackendError
        If no backend has that name.
    BackendUnavailableError
        If the backend was named and cannot run here.
    TypeError
        If `backend` is neither a name nor a backend.

    Examples
    --------
    >>> import gpuroi
    >>> backend = gpuroi.get_backend("cpu")
    >>> backend.name, backend.xp.__name__
    ('cpu', 'numpy')
    >>> gpuroi.get_backend(backend) is backend
    True
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
            if isinstance(reason, DeviceFullError):  # who has a GPU counts on it
                warn(f"'auto' does without {candidate!r}: {reason}")
            reasons.append(f"{candidate}: {reason}")
    raise BackendUnavailableError("no backend can run here. " + " ".join(reasons))

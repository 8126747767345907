"""The CPU backend: NumPy and SciPy, with connected-components-3d for labels where installed."""

import contextlib
import importlib.metadata
import platform
from pathlib import Path
from types import ModuleType

import numpy as np
import scipy  # which loads its parts when they are first used
from numpy.typing import DTypeLike, NDArray

from gpuroi.backends import LabelledVoxels, Staging
from gpuroi.backends._numbering import number_by_first_voxel
from gpuroi.backends._runs import label_runs
from gpuroi.backends._select import order_statistic
from gpuroi.types import Connectivity, FloatArray, Tail

cc3d: ModuleType | None
try:
    import cc3d
except ImportError:
    cc3d = None

_SLAB = 16

# To look at one window takes as long as to filter this many voxels.
_VOXELS_A_WINDOW = 1000

# Standard deviations at which scipy.ndimage cuts a Gaussian off.
_TRUNCATE = 4.0


def load() -> "CpuBackend":
    """Return the CPU backend, which can run everywhere."""
    return CpuBackend()


class CpuBackend:
    """One volume after the other, on the indices of the foreground wherever that is shorter."""

    name = "cpu"
    xp: ModuleType = np
    batch_bytes = 1  # one volume: it stays in the cache from verb to verb

    def __init__(self, use_cc3d: bool = True) -> None:
        self.device = _processor()
        self._cc3d = cc3d if use_cc3d else None
        packages = ["numpy", "scipy"] + ["connected-components-3d"] * (self._cc3d is not None)
        self._versions = {package: importlib.metadata.version(package) for package in packages}

    def versions(self) -> dict[str, str]:
        """See `gpuroi.backends.Backend.versions`."""
        return self._versions

    def to_device(self, host: NDArray[np.generic]) -> NDArray[np.generic]:
        """See `gpuroi.backends.Backend.to_device`; any memory layout will do."""
        return host

    def staging(self, shape: tuple[int, int, int, int], dtype: DTypeLike) -> Staging:
        """See `gpuroi.backends.Backend.staging`."""
        n, x, y, z = shape
        host = np.empty((n, z, y, x), dtype).transpose(0, 3, 2, 1)
        return Staging(host, lambda n: lambda: host[:n])

    def to_host(self, array: NDArray[np.generic]) -> NDArray[np.generic]:
        """See `gpuroi.backends.Backend.to_host`."""
        return array

    def order_statistics(
        self,
        maps: FloatArray,
        ranks: NDArray[np.int64],
        absolute: bool,
        population: NDArray[np.bool_] | None,
    ) -> FloatArray:
        """See `gpuroi.backends.Backend.order_statistics`."""
        statistics = np.empty(ranks.shape, maps.dtype)
        for b, volume in enumerate(maps):
            values = volume.ravel(order="K") if population is None else volume[population[b]]
            statistics[b] = order_statistic(values, ranks[b], absolute)
        return statistics

    def components(
        self,
        maps: FloatArray,
        cutoffs: FloatArray,
        tail: Tail,
        connectivity: Connectivity,
        min_voxels: int,
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """See `gpuroi.backends.Backend.components`."""
        labels = np.zeros(maps.shape, np.int32)
        counts = np.empty(len(maps), np.int32)
        found = self.component_voxels(maps, cutoffs, tail, connectivity, min_voxels)
        for b, voxels in enumerate(found):
            labels[b].ravel()[voxels.index] = voxels.label
            counts[b] = voxels.n_regions
        return labels, counts

    def component_voxels(
        self,
        maps: FloatArray,
        cutoffs: FloatArray,
        tail: Tail,
        connectivity: Connectivity,
        min_voxels: int,
    ) -> list[LabelledVoxels]:
        """See `gpuroi.backends.Backend.component_voxels`."""
        found = []
        for volume, cutoff in zip(maps, cutoffs, strict=True):
            signs = _signs(volume, cutoff, tail)
            foreground = np.flatnonzero(signs != 0)  # of a bool: NumPy's fast path
            component, n_components = self._label(signs, foreground, connectivity)
            found.append(number_by_first_voxel(foreground, component, n_components, min_voxels))
        return found

    def _label(
        self, signs: NDArray[np.uint8], foreground: NDArray[np.int64], connectivity: Connectivity
    ) -> tuple[NDArray[np.integer], int]:
        """Return a component (0..n-1) for each voxel of the foreground, and n."""
        if self._cc3d is None:
            return label_runs(signs, foreground, connectivity)
        if foreground.size == 0:
            return foreground, 0
        # Without the empty slabs at either end of x, which are no copy to leave out.
        slab = signs[0].size
        begin, end = foreground[0] // slab, foreground[-1] // slab + 1
        labels, n_components = self._cc3d.connected_components(
            signs[begin:end], connectivity=connectivity, return_N=True
        )
        component = labels.ravel()[foreground - begin * slab]
        return np.subtract(component, 1, dtype=np.intp), n_components

    def smooth(self, maps: FloatArray, sigma_voxels: tuple[float, float, float]) -> FloatArray:
        """See `gpuroi.backends.Backend.smooth`."""
        smoothed = np.zeros(maps.shape, maps.dtype)
        for volume, out in zip(maps, smoothed, strict=True):
            box = _reach(volume, sigma_voxels)
            inside = volume[box]
            for axis, sigma in enumerate(sigma_voxels):
                if sigma > 0:
                    inside = scipy.ndimage.gaussian_filter1d(inside, sigma, axis=axis)
            out[box] = inside
        return smoothed

    def local_maxima(
        self, maps: FloatArray, distance: int, floors: FloatArray
    ) -> NDArray[np.int32]:
        """See `gpuroi.backends.Backend.local_maxima`."""
        seeds = np.zeros(maps.shape, np.int32)
        for volume, floor, out in zip(maps, floors, seeds, strict=True):
            maxima = _window_maxima(volume, distance, floor)
            is_maximum = np.zeros(volume.shape, np.uint8)
            is_maximum.ravel()[maxima] = 1
            plateau, n_plateaus = label_runs(is_maximum, maxima, 6)
            out.ravel()[maxima] = number_by_first_voxel(maxima, plateau, n_plateaus, 1).label
        return seeds


def _processor() -> str:
    """Return the model of the processor where the system tells, else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _signs(volume: FloatArray, cutoff: np.floating, tail: Tail) -> NDArray[np.uint8]:
    """Return 1 where `volume` reaches the cut-off, 255 where it does below zero, 0 elsewhere.

    In C order whatever the layout of `volume`, a byte a voxel. Slabs across the last axis are
    contiguous in a file's layout, and small enough that no fresh memory is needed for each.
    """
    signs = np.empty(volume.shape, np.int8)
    for z in range(0, volume.shape[2], _SLAB):
        slab = volume[..., z : z + _SLAB]
        if tail == "negative":
            signs[..., z : z + _SLAB] = slab <= -cutoff
        else:
            side = (slab >= cutoff).view(np.int8)
            if tail == "both":
                side -= (slab <= -cutoff).view(np.int8)
            signs[..., z : z + _SLAB] = side
    return signs.view(np.uint8)


def _reach(
    volume: FloatArray, sigma_voxels: tuple[float, float, float]
) -> tuple[slice, slice, slice]:
    """Return the box beyond which a smoothed `volume` is zero.

    A filter in the box reads only zeros beyond it, as in the whole volume: the bits are the same.
    """
    nonzero = volume != 0
    box = []
    for axis, sigma in enumerate(sigma_voxels):
        others = tuple(other for other in range(3) if other != axis)
        planes = np.flatnonzero(nonzero.any(axis=others))
        radius = int(_TRUNCATE * sigma + 0.5)
        first, last = (planes[0], planes[-1]) if planes.size else (0, 0)
        box.append(slice(max(0, first - radius), last + radius + 1))
    return box[0], box[1], box[2]


def _window_maxima(volume: FloatArray, distance: int, floor: np.floating) -> NDArray[np.int64]:
    """Return the flat indices, ascending, of the maxima above `floor` within `distance` voxels.

    The volume is divided into blocks so small that a voxel's window holds its own and the 26 around
    it. Few voxels are the maximum of these, and only theirs is the whole window looked at.
    """
    index = np.flatnonzero(volume > floor)
    if distance == 0 or index.size == 0:
        return index
    voxels = np.stack(np.unravel_index(index, volume.shape))
    heights = volume[tuple(voxels)]
    side = (distance + 1) // 2
    grid = tuple(-(-n // side) for n in volume.shape)
    block = np.ravel_multi_index(tuple(voxels // side), grid)
    highest = np.full(grid, floor)
    np.maximum.at(highest.ravel(), block, heights)
    highest = scipy.ndimage.maximum_filter(highest, 3, mode="nearest")
    candidates = np.flatnonzero(heights >= highest.ravel()[block])
    if candidates.size * _VOXELS_A_WINDOW > volume.size:  # plateaus
        in_window = scipy.ndimage.maximum_filter(volume, 2 * distance + 1, mode="constant")
        return np.asarray(index[heights >= in_window.ravel()[index]])
    is_maximum = [
        heights[candidate]
        >= volume[tuple(slice(max(0, i - distance), i + distance + 1) for i in voxel)].max()
        for candidate, voxel in zip(candidates, voxels.T[candidates].tolist(), strict=True)
    ]
    return np.asarray(index[candidates[np.array(is_maximum, bool)]])

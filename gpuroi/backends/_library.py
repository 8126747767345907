"""The verbs of a CUDA backend in calls of CuPy.

One sequence of launches serves a whole batch, but for sorting, which is faster volume by volume.
Labels come from ``cupyx.scipy.ndimage.label``, which numbers as SciPy does and takes the batch as
one 4-D array; cuCIM's ``measure.label`` is the same kernels without a structuring element, volume
by volume, and serves the tests as an oracle. Library calls that round differently
from SciPy (percentiles, Gaussian filters) are replaced by exact ones made of array operations.
"""

import math
from itertools import pairwise
from types import ModuleType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from gpuroi.backends import LabelledVoxels, _keys
from gpuroi.backends._stencils import gaussian_half_kernel, neighbourhood
from gpuroi.types import Array, Connectivity, FloatArray, Tail

# Flat voxel indices of one launch sequence are 32-bit.
_MAX_VOXELS = 2**31 - 2

_SIDES: tuple[Tail, Tail] = ("positive", "negative")


class LibraryVerbs:
    """Order statistics, components, smoothing and maxima as array operations of `xp`.

    The namespaces are passed in, so that the same lines run on NumPy and SciPy in the tests of
    machines without a GPU.
    """

    def __init__(self, xp: ModuleType, ndimage: Any) -> None:
        self._xp = xp
        self._ndimage = ndimage

    def order_statistics(
        self,
        maps: Array,
        ranks: NDArray[np.int64],
        absolute: bool,
        population: Array | None,
    ) -> FloatArray:
        """See `gpuroi.backends.Backend.order_statistics`."""
        xp = self._xp
        keys = _keys.magnitude(maps) if absolute else _keys.ordered(xp, maps)
        if population is not None:
            keys = xp.where(population, keys, _largest(keys))
        # Row by row: integers in one dimension go through CUB's radix sort.
        selected = xp.empty(ranks.shape, keys.dtype)
        for b, (volume, rank) in enumerate(zip(keys, ranks, strict=True)):
            selected[b] = xp.sort(volume.ravel())[xp.asarray(rank)]
        dtype = maps.dtype.name
        values = selected.view(dtype) if absolute else _keys.from_ordered(xp, selected, dtype)
        return cast(FloatArray, self._to_host(values))

    def components(
        self,
        maps: Array,
        cutoffs: FloatArray,
        tail: Tail,
        connectivity: Connectivity,
        min_voxels: int,
    ) -> tuple[Array, Array]:
        """See `gpuroi.backends.Backend.components`."""
        xp = self._xp
        labels = xp.zeros(maps.shape, xp.int32)
        counts = []
        for piece in _pieces(maps):
            index, label, n = self._regions(
                maps[piece], cutoffs[piece], tail, connectivity, min_voxels
            )
            labels[piece].ravel()[index] = label
            counts.append(n)
        return labels, counts[0] if len(counts) == 1 else xp.concatenate(counts)

    def component_voxels(
        self,
        maps: Array,
        cutoffs: FloatArray,
        tail: Tail,
        connectivity: Connectivity,
        min_voxels: int,
    ) -> list[LabelledVoxels]:
        """See `gpuroi.backends.Backend.component_voxels`."""
        return [
            found
            for piece in _pieces(maps)
            for found in self._voxels(maps[piece], cutoffs[piece], tail, connectivity, min_voxels)
        ]

    def _voxels(
        self,
        maps: Array,
        cutoffs: FloatArray,
        tail: Tail,
        connectivity: Connectivity,
        min_voxels: int,
    ) -> list[LabelledVoxels]:
        found = self._regions(maps, cutoffs, tail, connectivity, min_voxels)
        index, label, counts = (self._to_host(array) for array in found)  # waits
        n_voxels = math.prod(maps.shape[1:])
        bounds = np.searchsorted(index, np.arange(len(maps) + 1) * n_voxels)
        return [
            LabelledVoxels(index[start:stop] - b * n_voxels, label[start:stop], n_regions)
            for b, ((start, stop), n_regions) in enumerate(
                zip(pairwise(bounds.tolist()), counts.tolist(), strict=True)
            )
        ]

    def _regions(
        self,
        maps: Array,
        cutoffs: FloatArray,
        tail: Tail,
        connectivity: Connectivity,
        min_voxels: int,
    ) -> tuple[Array, Array, Array]:
        """Return the flat indices in the batch of all regions' voxels, their labels, the counts."""
        xp = self._xp
        # No links along the batch axis: one call labels every volume on its own.
        structure = np.zeros((3, 3, 3, 3), bool)
        structure[1] = neighbourhood(connectivity)
        component = xp.zeros(maps.shape, xp.int32)
        n_components = 0
        for side in _SIDES:
            if tail in ("both", side):
                foreground = _keys.reaches(xp, maps, cutoffs, side)
                labels, n = self._ndimage.label(foreground, structure)  # waits
                component = xp.where(labels > 0, labels + n_components, component)
                n_components += n

        # From here on the foreground alone; a component is an entry of `sizes` and `first`.
        index = xp.flatnonzero(component)  # waits
        own = component.ravel()[index] - 1
        sizes = self._count(own, n_components)
        first = xp.full(n_components, _MAX_VOXELS, xp.int32)
        xp.minimum.at(first, own, index.astype(xp.int32))
        large = xp.flatnonzero(sizes >= min_voxels)  # waits
        large = large[xp.argsort(first[large])]
        volume = first[large] // max(1, math.prod(maps.shape[1:]))
        counts = self._count(volume, len(maps))
        before = xp.cumsum(counts) - counts
        label_of = xp.zeros(n_components, xp.int32)
        label_of[large] = (xp.arange(large.size) - before[volume] + 1).astype(xp.int32)
        label = label_of[own]
        kept = label > 0
        return index[kept].astype(xp.int64), label[kept], counts

    def _count(self, numbers: Array, n: int) -> Array:
        """Return how often each number below `n` occurs, int32.

        Unlike bincount, whose histogram of many bins may ask a device for gigabytes to work in.
        """
        counts = self._xp.zeros(n, self._xp.int32)
        self._xp.add.at(counts, numbers, self._xp.ones(numbers.shape, self._xp.int32))
        return counts

    def smooth(self, maps: Array, sigma_voxels: tuple[float, float, float]) -> Array:
        """See `gpuroi.backends.Backend.smooth`."""
        smoothed = maps
        for axis, sigma in enumerate(sigma_voxels, start=1):
            if sigma > 0:
                smoothed = self._smooth_axis(smoothed, axis, gaussian_half_kernel(sigma))
        return smoothed.copy() if smoothed is maps else smoothed

    def _smooth_axis(self, maps: Array, axis: int, weights: NDArray[np.float64]) -> Array:
        """Return one axis smoothed: the centre first, then pairs from the outside in, as SciPy.

        Each operation is a kernel of its own, so none is fused into a multiply-add.
        """
        xp = self._xp
        radius = weights.size - 1
        n = maps.shape[axis]
        lines = xp.moveaxis(maps, axis, -1).astype(xp.float64)
        # "reflect" of scipy.ndimage: (d c b a | a b c d | d c b a)
        source = np.arange(-radius, n + radius) % (2 * n)
        lines = lines[..., xp.asarray(np.where(source < n, source, 2 * n - 1 - source))]
        total = lines[..., radius : radius + n] * weights[0]
        for offset in range(radius, 0, -1):
            before = lines[..., radius - offset : radius - offset + n]
            after = lines[..., radius + offset : radius + offset + n]
            total = total + (before + after) * weights[offset]
        return xp.ascontiguousarray(xp.moveaxis(total.astype(maps.dtype), -1, axis))

    def local_maxima(self, maps: Array, distance: int, floors: FloatArray) -> Array:
        """See `gpuroi.backends.Backend.local_maxima`."""
        xp = self._xp
        heights, floor_heights = maps, xp.asarray(floors)
        if maps.dtype == np.float32:
            # Only single precision is flushed to zero, and only 32 bits fit into the doubles that
            # filters compute with.
            heights, floor_heights = (_keys.ordered(xp, values) for values in (maps, floor_heights))
        width = 2 * distance + 1
        # Outside counts as 0, which is the key of 0.0 too: below every maximum that may be found.
        highest = self._ndimage.maximum_filter(
            heights, size=(1, width, width, width), mode="constant"
        )
        is_seed = (heights == highest) & (heights > floor_heights.reshape(-1, 1, 1, 1))
        structure = np.zeros((3, 3, 3, 3), bool)
        structure[1] = neighbourhood(6)
        labels, _ = self._ndimage.label(is_seed, structure)  # waits
        # Numbers run through the batch in C order: let each volume start at 1.
        numbered = xp.where(labels > 0, labels, _largest(labels))
        below = numbered.min(axis=(1, 2, 3), keepdims=True) - 1
        return xp.where(labels > 0, labels - below, 0).astype(xp.int32)

    def _to_host(self, array: Array) -> Any:
        return array.get() if hasattr(array, "get") else array  # waits


def _pieces(maps: Array) -> list[slice]:
    """Return the parts of a batch that 32-bit indices suffice for; of an empty one, itself."""
    n_voxels = math.prod(maps.shape[1:])
    at_once = _MAX_VOXELS // max(1, n_voxels)
    if at_once == 0:
        raise ValueError(f"a volume of {n_voxels} voxels is too large for 32-bit labels.")
    return [slice(b, b + at_once) for b in range(0, max(1, len(maps)), at_once)]


def _largest(integers: Array) -> Any:
    return integers.dtype.type(np.iinfo(integers.dtype).max)

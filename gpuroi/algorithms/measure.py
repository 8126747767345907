"""Regions as lists of voxels, and what is measured on them.

A kept region is a few percent of a volume: everything behind the labelling works on these voxels
alone, ordered by region and, within one, in C order.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuroi.backends import LabelledVoxels


@dataclass(frozen=True)
class RegionVoxels:
    """The voxels of regions 1..n of one volume; region k holds ``starts[k-1]:starts[k]``."""

    shape: tuple[int, int, int]
    index: NDArray[np.int64]  # (m,) flat, C order of `shape`
    coordinates: tuple[NDArray[np.int64], ...]  # x, y, z, each (m,)
    values: NDArray[Any]  # (m,) of the map
    starts: NDArray[np.int64]  # (n + 1,)

    def __len__(self) -> int:
        return self.starts.size - 1

    def labels(self) -> NDArray[np.int32]:
        """Return the labels ``(X, Y, Z)``, 0 is background."""
        volume = np.zeros(self.shape, np.int32)
        numbers = np.arange(1, len(self) + 1, dtype=np.int32)
        volume.ravel()[self.index] = np.repeat(numbers, np.diff(self.starts))
        return volume


def gather(found: LabelledVoxels, volume: NDArray[Any]) -> RegionVoxels:
    """Return what a backend found in `volume`, region by region, with the values of `volume`."""
    label = found.label
    if found.n_regions <= np.iinfo(np.uint16).max:
        label = label.astype(np.uint16)  # NumPy sorts 16 bits by radix, wider ones by merging
    index = found.index[np.argsort(label, kind="stable")]
    starts = np.cumsum(np.bincount(label, minlength=found.n_regions + 1))
    # Not by flat index: the map may have any memory layout, and a copy of it would cost more.
    coordinates = _unravelled(index, volume.shape)
    return RegionVoxels(volume.shape, index, coordinates, volume[coordinates], starts)


def _unravelled(index: NDArray[np.int64], shape: tuple[int, ...]) -> tuple[NDArray[np.int64], ...]:
    """Return what `numpy.unravel_index` does of a volume, faster: by divisions of whole arrays.

    Each coordinate lies in one piece, so that measuring is faster too.
    """
    _, n_y, n_z = shape
    columns = index // n_z
    x = columns // n_y
    return x, columns - x * n_y, index - columns * n_z


@dataclass(frozen=True)
class Measures:
    """One entry a region; coordinates are in voxels ``(n, 3)``."""

    voxels: NDArray[np.int64]
    sign: NDArray[np.int8]
    peak_value: NDArray[np.float64]
    peak: NDArray[np.int64]
    mean_value: NDArray[np.float64]
    center_of_mass: NDArray[np.float64]
    touches_edge: NDArray[np.bool_]


def measure(regions: RegionVoxels) -> Measures:
    """Return sizes, peaks, means, centres of mass and whether a region touches the field of view.

    The peak is the voxel of largest magnitude, the first one in C order on a tie. The centre of
    mass weighs voxels by magnitude. Sums are in float64.
    """
    n = len(regions)
    starts = regions.starts[:-1]
    voxels = np.diff(regions.starts)
    if n == 0:
        none = np.zeros(0)
        return Measures(
            voxels,
            none.astype(np.int8),
            none,
            np.zeros((0, 3), np.int64),
            none,
            np.zeros((0, 3)),
            none.astype(bool),
        )
    values = regions.values.astype(np.float64)
    magnitudes = np.abs(values)
    at_peak = np.flatnonzero(
        magnitudes == np.repeat(np.maximum.reduceat(magnitudes, starts), voxels)
    )
    peak = at_peak[np.searchsorted(at_peak, starts)]
    mass = np.add.reduceat(magnitudes, starts)
    center_of_mass = np.empty((n, 3))
    touches_edge = np.zeros(n, bool)
    for axis, (coordinate, length) in enumerate(
        zip(regions.coordinates, regions.shape, strict=True)
    ):
        center_of_mass[:, axis] = np.add.reduceat(coordinate * magnitudes, starts) / mass
        touches_edge |= np.minimum.reduceat(coordinate, starts) == 0
        touches_edge |= np.maximum.reduceat(coordinate, starts) == length - 1
    return Measures(
        voxels=voxels,
        sign=np.sign(values[peak]).astype(np.int8),
        peak_value=values[peak],
        peak=np.stack([coordinate[peak] for coordinate in regions.coordinates], axis=1),
        mean_value=np.add.reduceat(values, starts) / voxels,
        center_of_mass=center_of_mass,
        touches_edge=touches_edge,
    )

"""Regions around local maxima: smooth, find seeds, let the seeds compete for the foreground.

The steps and constants are those of ``local_regions`` in nilearn, after Abraham et al., "Region
segmentation for sparse decompositions", 2014 (doi:10.1007/978-3-319-12289-2_7). Smoothing and seeds
run on the backend; the competition is solved on the host.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuroi.backends import Backend, LabelledVoxels, _keys
from gpuroi.backends._numbering import number_by_first_voxel
from gpuroi.errors import warn
from gpuroi.types import Array

# The walker's solvers take a twentieth of a second to import, which components can spare.
if TYPE_CHECKING:
    from gpuroi.algorithms.walker import Confidence, Walk

#: A seed is the maximum of a window that reaches this far to each side.
SEED_DISTANCE_VOXELS = 10

#: A seed exceeds this share of the maximum of the smoothed map.
SEED_FLOOR = 0.1


@dataclass(frozen=True)
class Foreground:
    """The non-zero voxels of one volume, on the host, in C order."""

    index: NDArray[np.int64]  # flat
    values: NDArray[np.floating]
    seeds: NDArray[np.int32]  # 0 or the number of a seed
    shape: tuple[int, int, int]

    def walk(self) -> "Walk":
        """Return each voxel's label: the number of the seed that wins it, or 0."""
        from gpuroi.algorithms.walker import random_walk

        return random_walk(self.index, self.values, self.seeds, self.shape)


def find_seeds(
    backend: Backend,
    maps: Array,
    sigma_voxels: tuple[float, float, float],
    distance: int,
) -> Iterator[Foreground]:
    """Yield the foreground of each of `maps` ``(B, X, Y, Z)`` with its seeds.

    Seeds are the maxima, within `distance` voxels to each side, of the smoothed map; a smoothed map
    that is constant has none.
    """
    xp = backend.xp
    smoothed = backend.smooth(maps, sigma_voxels)
    highest = backend.to_host(smoothed.max(axis=(1, 2, 3)))  # waits
    lowest = backend.to_host(smoothed.min(axis=(1, 2, 3)))
    floors = np.maximum(highest * highest.dtype.type(SEED_FLOOR), 0)
    floors[highest == lowest] = np.inf
    seeds = backend.local_maxima(smoothed, distance, floors)

    index = xp.flatnonzero(_keys.magnitude(maps) != 0)  # waits
    values = backend.to_host(maps.ravel()[index])
    seed_of = backend.to_host(seeds.ravel()[index])
    index = backend.to_host(index).astype(np.int64)
    n_voxels = maps[0].size
    bounds = np.searchsorted(index, np.arange(len(maps) + 1) * n_voxels)
    for b, (start, stop) in enumerate(pairwise(bounds)):
        voxels = slice(start, stop)
        yield Foreground(
            index[voxels] - b * n_voxels, values[voxels], seed_of[voxels], tuple(maps.shape[1:])
        )


@dataclass(frozen=True)
class Contest:
    """The foreground of each sign of one volume, whose seeds still compete."""

    sides: tuple[Foreground, ...]

    def settle(self, min_voxels: int) -> tuple[LabelledVoxels, "Confidence"]:
        """Return the regions of all sides, numbered together by first voxel in C order.

        Regions with fewer than `min_voxels` voxels are background.
        """
        from gpuroi.algorithms.walker import Confidence

        walks = [side.walk() for side in self.sides]
        n_regions = 0
        index, region = [], []
        for side, walk in zip(self.sides, walks, strict=True):
            labelled = walk.label > 0
            index.append(side.index[labelled])
            region.append(walk.label[labelled] - 1 + n_regions)
            n_regions += int(walk.label.max(initial=0))
        all_index, all_regions = np.concatenate(index), np.concatenate(region)
        order = np.argsort(all_index)
        found = number_by_first_voxel(all_index[order], all_regions[order], n_regions, min_voxels)
        return found, Confidence.lowest(walk.confidence for walk in walks)


def large_in_seed_order(
    index: NDArray[np.int64], label: NDArray[np.int32], min_voxels: int
) -> LabelledVoxels:
    """Return the regions with at least `min_voxels` voxels, numbered in the order of their seeds.

    `index` holds flat indices in C order, `label` the seed of each, 0 for none.
    """
    sizes = np.bincount(label, minlength=1)
    is_large = sizes >= max(1, min_voxels)  # seeds that were dropped have no voxel
    is_large[0] = False
    numbers = np.cumsum(is_large, dtype=np.int32)
    kept = is_large[label]
    return LabelledVoxels(index[kept], numbers[label[kept]], int(numbers[-1]))


def warn_of_undecided(name: str, confidence: "Confidence") -> None:
    """Warn if some voxels of the map `name` could as well have another label."""
    if confidence.n_undecided:
        warn(
            f"{name}: {confidence.n_undecided} voxels lie between two regions more closely than "
            f"the random walker can tell (probabilities are good to {confidence.error:.0e}); "
            "their labels may differ on another machine."
        )

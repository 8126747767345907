"""The numbers of regions: the size filter, and 1..n by first voxel in C order."""

import numpy as np
from numpy.typing import NDArray

from gpuroi.backends import LabelledVoxels


def number_by_first_voxel(
    index: NDArray[np.int64],
    region: NDArray[np.integer],
    n_regions: int,
    min_voxels: int,
) -> LabelledVoxels:
    """Return the voxels of the regions that are large enough, with their final labels.

    `index` holds flat indices in C order, ascending; `region` a number 0..n_regions-1 for each.
    """
    sizes = np.bincount(region, minlength=n_regions)
    large = np.flatnonzero(sizes >= max(1, min_voxels))  # some numbers may have no voxel
    first_voxel = np.empty(n_regions, np.int64)
    first_voxel[region[::-1]] = index[::-1]  # the last assignment wins
    label_of = np.zeros(n_regions, np.int32)
    label_of[large[np.argsort(first_voxel[large])]] = np.arange(1, large.size + 1, dtype=np.int32)
    label = label_of[region]
    kept = label > 0
    return LabelledVoxels(index[kept], label[kept], large.size)

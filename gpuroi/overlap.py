"""In how many maps each voxel lies in a region."""

from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from gpuroi import io
from gpuroi.space import same_grid


class Overlap:
    """Counts of maps, as long as all are on the grid of the first.

    Attributes
    ----------
    counts : int32 array (X, Y, Z), or None before the first map and after one on another grid
    affine : float64 array (4, 4)
        Voxel to mm.
    """

    def __init__(self) -> None:
        self.counts: NDArray[np.int32] | None = None
        self.affine = np.eye(4)
        self._header: Any = None

    def add(
        self,
        index: NDArray[np.int64],
        shape: tuple[int, ...],
        affine: NDArray[np.float64],
        header: Any,
    ) -> None:
        """Count the voxels of a map's regions, one each: regions do not overlap.

        `index` holds their flat indices in C order of `shape`; `header` is the map's.
        """
        if self._header is None:
            self._header, self.affine = header, affine
            self.counts = np.zeros(shape, np.int32)
        if self.counts is None:
            return
        if not same_grid(self.counts.shape, self.affine, shape, affine):
            self.counts = None
            return
        self.counts.ravel()[index] += 1

    def image(self) -> nib.Nifti1Image:
        """Return the counts in the smallest integer type."""
        assert self.counts is not None
        counts = self.counts.astype(io.smallest_label_dtype(int(self.counts.max(initial=0))))
        image = io.labels_image(counts, self.affine, self._header)
        header: Any = image.header
        header.set_intent("none", name="maps per voxel")
        return image

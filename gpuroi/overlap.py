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

    def add(self, where: NDArray[np.bool_], affine: NDArray[np.float64], header: Any) -> None:
        """Count a map whose regions are `where` ``(X, Y, Z)``; `header` is the map's."""
        self._add(where, affine, header)

    def merge(self, other: "Overlap") -> None:
        """Count the maps of `other` too."""
        if other._header is not None:
            self._add(other.counts, other.affine, other._header)

    def _add(self, counts: NDArray[Any] | None, affine: NDArray[np.float64], header: Any) -> None:
        if self._header is None:
            self._header, self.affine = header, affine
            if counts is not None:  # in the order of the voxels of files, which are most added
                self.counts = np.zeros(counts.shape, np.int32, order="F")
        if self.counts is None:
            return
        if counts is None or not same_grid(self.counts.shape, self.affine, counts.shape, affine):
            self.counts = None
            return
        self.counts += counts

    def image(self) -> nib.Nifti1Image:
        """Return the counts in the smallest integer type."""
        assert self.counts is not None
        counts = self.counts.astype(io.smallest_label_dtype(int(self.counts.max(initial=0))))
        image = io.labels_image(counts, self.affine, self._header)
        header: Any = image.header
        header.set_intent("none", name="maps per voxel")
        return image

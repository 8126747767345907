"""nilearn's 4-D image of regions, one volume a region, without its memory.

1,212 regions of a 2 mm map fill 4.4 GB as dense float32 volumes; their voxels fill a few MB.
`RegionStack` keeps the voxels and makes the volumes that somebody indexes.
"""

import math
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.fileslice import canonical_slicers
from nibabel.volumeutils import seek_tell
from numpy.typing import NDArray

from gpuroi.algorithms.measure import RegionVoxels
from gpuroi.io import nifti_header

_DTYPE = np.dtype(np.float32)


class RegionStack:
    """An array proxy in nibabel's sense: shape, dtype, slicing, and dense only when asked.

    The volumes of all `parts` follow each other, region by region; voxels outside a region are 0.

    Parameters
    ----------
    parts : list of RegionVoxels
        One a map, one at least, all of one grid (X, Y, Z).

    Attributes
    ----------
    shape : tuple of int
        (X, Y, Z, n), for n regions.
    dtype : dtype
        float32, in map units.
    ndim : int
        4.

    Examples
    --------
    >>> import gpuroi, nibabel as nib, numpy as np
    >>> img = nib.Nifti1Image(np.array([[[3.0, 3.0, 0.0, 4.0]]]), np.eye(4))
    >>> stack = gpuroi.extract_regions(img, 2.0).to_4d_img().dataobj
    >>> stack.shape, stack[0, 0, :, 1]
    ((1, 1, 4, 2), array([0., 0., 0., 4.], dtype=float32))
    """

    is_proxy = True
    slope, inter = 1.0, 0.0  # nilearn's maskers ask every proxy

    def __init__(self, parts: list[RegionVoxels]) -> None:
        self._volumes = [(part, k) for part in parts for k in range(len(part))]
        self.shape = (*parts[0].shape, len(self._volumes))
        self.dtype = _DTYPE
        self.ndim = 4

    def __getitem__(self, slicer: Any) -> NDArray[np.float32]:
        """Return what NumPy would for ints, slices, Ellipsis and None; no more is allocated."""
        keys = canonical_slicers(slicer, self.shape, check_inds=False)
        axis_keys = [key for key in keys if key is not None]
        for axis, (key, n) in enumerate(zip(axis_keys, self.shape, strict=True)):
            if not isinstance(key, slice) and not 0 <= key < n:
                raise IndexError(f"index out of bounds for axis {axis} with size {n}")
        wanted = [
            np.arange(n)[key if isinstance(key, slice) else slice(key, key + 1)]
            for key, n in zip(axis_keys, self.shape, strict=True)
        ]
        out = np.zeros([places.size for places in wanted], _DTYPE)
        for place, volume in enumerate(wanted[3]):
            self._fill(out[..., place], volume, wanted[:3])
        drop_or_keep = tuple(
            None if key is None else slice(None) if isinstance(key, slice) else 0 for key in keys
        )
        return out[drop_or_keep]

    def __array__(
        self, dtype: np.dtype[Any] | None = None, copy: bool | None = None
    ) -> NDArray[Any]:
        """Return the dense array, Fortran-ordered as nibabel's."""
        if copy is False:
            raise ValueError("a stack of regions has no dense array to share; it makes a new one.")
        out = np.zeros(self.shape, dtype or _DTYPE, order="F")
        for place in range(self.shape[3]):
            self._fill(out[..., place], place, None)
        return out

    def largest_and_smallest(self) -> tuple[float, float]:
        """Return the maximum and minimum of all volumes, with the background where there is one.

        Returns
        -------
        highest, lowest : float
            In map units.
        """
        values = [part.values for part in {id(part): part for part, _ in self._volumes}.values()]
        background = [0.0] if sum(v.size for v in values) < math.prod(self.shape) else []
        highest = max([float(v.max()) for v in values] + background)
        lowest = min([float(v.min()) for v in values] + background)
        return highest, lowest

    def _fill(self, out: NDArray[Any], volume: int, wanted: list[NDArray[np.intp]] | None) -> None:
        part, k = self._volumes[volume]
        voxels = slice(part.starts[k], part.starts[k + 1])
        xyz = tuple(coordinate[voxels] for coordinate in part.coordinates)
        with np.errstate(
            over="ignore"
        ):  # float64 maps beyond float32 become infinite, as nilearn's
            values = part.values[voxels].astype(_DTYPE)
        if wanted is None:
            out[xyz] = values
            return
        places = []
        for voxel, chosen, n in zip(xyz, wanted, part.shape, strict=True):
            place_of = np.full(n, -1)
            place_of[chosen] = np.arange(chosen.size)
            places.append(place_of[voxel])
        inside = np.logical_and.reduce([place >= 0 for place in places])
        out[tuple(place[inside] for place in places)] = values[inside]


class RegionImage(nib.Nifti1Image):
    """A `nibabel.Nifti1Image` that writes a `RegionStack` to disk volume by volume."""

    _nibabel_class: Any = nib.Nifti1Image

    @property
    def slicer(self) -> Any:
        """Slice as nibabel does, which trusts its very own classes to have space first."""
        return self._nibabel_class(self.dataobj, self.affine, self.header).slicer

    def to_file_map(self, file_map: Any = None, dtype: Any = None, **kwargs: Any) -> None:
        """Write the image; a stack is never made dense if it is stored as the float32 it is.

        Parameters
        ----------
        file_map : dict, optional
            As in nibabel: where to write, by default where the image was told to be.
        dtype : dtype, optional
            How voxels are stored, by default as the header says.
        **kwargs
            For nibabel's method, which writes any other dtype and any other array.
        """
        stack = self.dataobj
        target = self.get_data_dtype() if dtype is None else dtype
        if not isinstance(stack, RegionStack) or target not in (_DTYPE, _DTYPE.newbyteorder()):
            super().to_file_map(file_map, dtype, **kwargs)
            return
        self.file_map = self.file_map if file_map is None else file_map
        self.update_header()
        header = self.header.copy()
        header.set_data_dtype(_DTYPE)
        header.set_slope_inter(1, 0)
        with self.file_map["image"].get_prepare_fileobj(mode="wb") as stream:
            header.write_to(stream)
            seek_tell(stream, header.get_data_offset(), write0=True)
            for volume in range(stack.shape[3]):
                values = stack[..., volume].astype(_DTYPE.newbyteorder(header.endianness))
                stream.write(values.tobytes(order="F"))


class RegionNifti2Image(RegionImage, nib.Nifti2Image):
    """The same in NIfTI-2."""

    _nibabel_class = nib.Nifti2Image


def stack_image(parts: list[RegionVoxels], affine: NDArray[np.float64], header: Any) -> RegionImage:
    """Return the regions of all `parts` as one lazy 4-D image in the space of `header`.

    Parameters
    ----------
    parts : list of RegionVoxels
        One a map, with one region at least among them.
    affine : float64 array (4, 4)
        Voxel to mm.
    header : nibabel header
        Whose codes and units are kept.

    Returns
    -------
    RegionImage (X, Y, Z, n) float32, in map units
        In NIfTI-2 if `header` is, or if there are more regions than the 32,767 volumes that NIfTI-1
        can have.

    Examples
    --------
    >>> import nibabel as nib, numpy as np
    >>> from gpuroi.algorithms.measure import gather
    >>> from gpuroi.backends import LabelledVoxels
    >>> from gpuroi.stack import stack_image
    >>> found = LabelledVoxels(np.array([0, 3]), np.array([1, 2], np.int32), 2)
    >>> parts = [gather(found, np.array([[[3.0, 0.0, 0.0, 4.0]]]))]
    >>> stack_image(parts, np.eye(4), nib.Nifti1Header()).shape
    (1, 1, 4, 2)
    """
    stack = RegionStack(parts)
    in_nifti2 = isinstance(header, nib.Nifti2Header) or stack.shape[3] > np.iinfo(np.int16).max
    image_class = RegionNifti2Image if in_nifti2 else RegionImage
    new_header = nifti_header(header, image_class.header_class)
    new_header.set_data_dtype(_DTYPE)
    new_header.set_slope_inter(1, 0)
    new_header["cal_max"], new_header["cal_min"] = stack.largest_and_smallest()
    return image_class(stack, affine, new_header)

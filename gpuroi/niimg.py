"""Images as nilearn takes and makes them: paths, patterns, lists, and headers that are kept."""

import glob
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage
from numpy.typing import NDArray

from gpuroi import io
from gpuroi.errors import InvalidMapError
from gpuroi.types import ImageLike


def load_images(source: ImageLike | Iterable[ImageLike]) -> SpatialImage:
    """Return what nilearn would load: an image, a path or a pattern, or many as one 4-D image.

    Raises
    ------
    InvalidMapError
        If a file cannot be read, nothing matches, images of one list lie on different grids, or
        an image is neither 3-D nor 4-D.
    """
    if isinstance(source, str) and glob.has_magic(source) and not Path(source).exists():
        matches = sorted(glob.glob(os.path.expanduser(source)))  # noqa: PTH111, PTH207
        if not matches:
            raise InvalidMapError(f"{source}: no file matches this pattern.")
        return load_images(matches[0] if len(matches) == 1 else matches)
    if isinstance(source, str | os.PathLike | SpatialImage) or not isinstance(source, Iterable):
        image = io.load(source)
        name = io.describe(source)
        if len(image.shape) not in (3, 4):
            raise InvalidMapError(f"{name}: expected a 3-D or 4-D image, got shape {image.shape}.")
        io.check_affine(image.affine, name)
        return image
    images = [load_images(one) for one in source]
    if not images:
        raise TypeError("the list of images is empty; pass at least one.")
    first = images[0]
    for number, other in enumerate(images):
        if not io.same_grid(first.shape, first.affine, other.shape, other.affine):
            raise InvalidMapError(
                f"image {number} of the list ({io.describe(other)}) is on another grid than the "
                f"first ({io.describe(first)}): shape {other.shape} against {first.shape}, affines"
                f"\n{other.affine}\nagainst\n{first.affine}"
            )
    volumes = [voxels(one, copy=False) for one in images]
    series = np.concatenate([v[..., np.newaxis] if v.ndim == 3 else v for v in volumes], axis=-1)
    return image_like(first, series.astype(np.float32))


def voxels(image: SpatialImage, *, copy: bool) -> NDArray[Any]:
    """Return the scaled voxels of `image`, as stored in memory if it is there already."""
    data = io.real_voxels(image, io.describe(image))
    in_memory = isinstance(image.dataobj, np.ndarray)
    return data.copy(order="K") if copy and in_memory else data


def image_like(
    reference: SpatialImage, data: NDArray[Any], *, copy_header: bool = True
) -> SpatialImage:
    """Return an image of the class, affine and (if asked) header of `reference` with `data`."""
    header: Any = None
    if copy_header:
        header = reference.header.copy()
        fields = header.keys() if hasattr(header, "keys") else ()
        for field in {"scl_slope", "scl_inter", "glmax"} & set(fields):
            header[field] = 0
        if "cal_max" in fields:
            header["cal_max"], header["cal_min"] = data.max(initial=0), data.min(initial=0)
    if data.dtype in (np.int64, np.uint64):
        data = _narrowed(data)
    image_class = type(reference)
    if image_class is nib.Nifti1Pair:
        image_class = nib.Nifti1Image
    return image_class(data, reference.affine, header=header)


def _narrowed(data: NDArray[Any]) -> NDArray[Any]:
    """Return 64-bit integers as int32 where they fit, because few tools read them from NIfTI."""
    int32 = np.iinfo(np.int32)
    if data.min(initial=0) < int32.min or data.max(initial=0) > int32.max:
        return data
    warnings.warn(
        "the voxels are 64-bit integers, which most tools do not read; the result is int32.",
        UserWarning,
        stacklevel=4,
    )
    return data.astype(np.int32)

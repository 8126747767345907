"""Images as nilearn takes and makes them: paths, patterns, lists, and headers that are kept."""

import glob
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage
from numpy.typing import NDArray

from gpuroi import io
from gpuroi.errors import DimensionError, InvalidMapError, warn
from gpuroi.space import check_affine, difference_of_grids, same_grid
from gpuroi.types import ImageLike


def load_images(source: ImageLike | Iterable[ImageLike]) -> SpatialImage:
    """Return what nilearn would load: an image, a path or a pattern, or many as one 4-D image.

    A pattern gives a 4-D image however many files match; many have the dtype that holds them all.

    Raises
    ------
    InvalidMapError
        If a file cannot be read, nothing matches, images of one list lie on different grids, or
        an image is neither 3-D nor 4-D.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        if glob.has_magic(os.fspath(path)) and not path.exists():
            matches = sorted(glob.glob(os.fspath(path)))  # noqa: PTH207
            if not matches:
                raise InvalidMapError(f"{source}: no file matches this pattern.")
            return load_images(matches)
    is_one = isinstance(source, str | os.PathLike | SpatialImage | np.ndarray)
    if is_one or not isinstance(source, Iterable):
        one = cast(ImageLike, source)  # or something that is refused here
        image = io.load(one)
        name = io.describe(one)
        if len(image.shape) not in (3, 4):
            raise DimensionError(f"{name}: expected a 3-D or 4-D image, got shape {image.shape}.")
        check_affine(image.affine, name)
        return image
    images = [load_images(one) for one in source]
    if not images:
        raise TypeError("the list of images is empty; pass at least one.")
    first = images[0]
    for number, other in enumerate(images):
        if not same_grid(first.shape, first.affine, other.shape, other.affine):
            raise InvalidMapError(
                f"image {number} of the list ({io.describe(other)}) is on another grid than the "
                f"first ({io.describe(first)}): "
                f"{difference_of_grids(other.shape, other.affine, first.shape, first.affine)}."
            )
    volumes = [voxels(one, copy=False) for one in images]
    series = np.concatenate([v[..., np.newaxis] if v.ndim == 3 else v for v in volumes], axis=-1)
    return image_like(first, series)


def voxels(image: SpatialImage, *, copy: bool) -> NDArray[Any]:
    """Return the scaled voxels of `image`, as stored in memory if it is there already."""
    data = io.real_voxels(image, io.describe(image))
    in_memory = isinstance(image.dataobj, np.ndarray)
    return data.copy(order="K") if copy and in_memory else data


def narrowed(data: NDArray[Any]) -> NDArray[Any]:
    """Return 64-bit integers as int32 where they fit, because few tools read them from NIfTI."""
    if data.dtype not in (np.int64, np.uint64):
        return data
    int32 = np.iinfo(np.int32)
    fits = int32.min <= data.min(initial=0) and data.max(initial=0) <= int32.max
    warn(
        "the voxels are 64-bit integers, which most tools do not read; the result is "
        f"{'int32' if fits else 'the same, because some do not fit into 32 bits'}."
    )
    return data.astype(np.int32) if fits else data


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
        if "cal_max" in fields and data.size:
            header["cal_max"], header["cal_min"] = data.max(), data.min()
        # Scaled to integers on disk, the background would come back as a value beside zero.
        if data.dtype.kind == "f" and header.get_data_dtype().kind in "iu":
            header.set_data_dtype(data.dtype)
    image_class = type(reference)
    if image_class is nib.Nifti1Pair:
        image_class = nib.Nifti1Image
    return image_class(data, reference.affine, header=header)

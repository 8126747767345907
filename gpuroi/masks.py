"""Mask images: read, checked, and brought onto the grid of a map."""

from typing import Any

import numpy as np
import scipy  # which loads its parts when they are first used
from nibabel.spatialimages import SpatialImage
from numpy.typing import NDArray

from gpuroi import io, words
from gpuroi.checks import shown
from gpuroi.errors import DimensionError, InvalidMapError, warn
from gpuroi.space import check_affine, difference_of_grids, same_grid
from gpuroi.types import ImageLike


def load_image(
    mask_img: ImageLike, parameter: str, accepted: str = "a path or an image"
) -> SpatialImage:
    """Return `io.load` of a mask; errors name its `parameter`, and what is `accepted`."""
    try:
        return io.load(mask_img)
    except TypeError:
        raise TypeError(
            f"{parameter}={shown(mask_img)} is a {type(mask_img).__name__}; pass {accepted}."
        ) from None
    except InvalidMapError as error:
        raise InvalidMapError(f"{parameter}: {error}") from error


def check_mask(mask_img: SpatialImage, parameter: str) -> None:
    """Raise what `load_mask` does of a mask, whatever map it is for.

    Raises
    ------
    InvalidMapError
        If the mask is not 3-D, empty, or made of more than one value inside.
    """
    name = f"{parameter} {io.describe(mask_img)}"
    data, _ = _three_dimensional(mask_img, name)
    _inside(np.where(np.isfinite(data), data, 0), name, "everywhere")


def load_mask(
    mask_img: ImageLike,
    shape: tuple[int, int, int],
    affine: NDArray[np.float64],
    *,
    resample: bool,
    parameter: str = "mask_img",
) -> NDArray[np.bool_]:
    """Return `mask_img` as booleans ``(X, Y, Z)`` on the grid of `shape` and `affine`.

    Parameters
    ----------
    mask_img : path or image, 3-D
        Zero outside, one other value inside; not finite counts as outside, with a warning.
    resample : bool
        Take the nearest voxel where the mask lies on another grid; otherwise that is an error.
    parameter : str
        What error messages call the mask.

    Raises
    ------
    InvalidMapError
        If the mask is not 3-D, on another grid, empty, or made of more than one value inside.
    """
    name = f"{parameter} {io.describe(mask_img)}"
    data, mask_affine = _three_dimensional(load_image(mask_img, parameter), name)
    if not same_grid(data.shape, mask_affine, shape, affine):
        if not resample:
            raise InvalidMapError(
                f"{name} is on another grid than the map: "
                f"{difference_of_grids(data.shape, mask_affine, shape, affine)}. Pass "
                "resample_mask=True (--resample-mask) to take the nearest voxel of the mask."
            )
        data = _nearest(data, mask_affine, shape, affine)
    not_finite = ~np.isfinite(data)
    if not_finite.any():
        warn(f"{name}: {words.not_finite(int(np.count_nonzero(not_finite)))}, and outside.")
        data = np.where(not_finite, 0, data)
    return _inside(data, name, "everywhere on the map")


def _three_dimensional(
    image: SpatialImage, name: str
) -> tuple[NDArray[np.generic], NDArray[np.float64]]:
    """Return the voxels of a mask, and its affine."""
    data = io.read_data(image, name)
    if data.ndim != 3:
        raise DimensionError(f"{name}: expected a 3-D mask, got shape {data.shape}.")
    return data, check_affine(image.affine, name)


def _inside(data: NDArray[Any], name: str, where: str) -> NDArray[np.bool_]:
    is_inside = np.asarray(data != 0)
    inside = data[is_inside]
    if inside.size == 0:
        raise InvalidMapError(f"{name} is zero {where}: it would hide all voxels.")
    if inside.min() != inside.max():
        raise InvalidMapError(
            f"{name} has {np.unique(inside).size} values besides 0 ({inside.min():g} to "
            f"{inside.max():g}); a mask has one. Binarise it first, for example with "
            "nilearn.image.binarize_img."
        )
    return is_inside


def _nearest(
    data: NDArray[np.generic],
    affine: NDArray[np.float64],
    target_shape: tuple[int, int, int],
    target_affine: NDArray[np.float64],
) -> NDArray[np.generic]:
    # By SciPy's inverse, as nilearn: a last bit decides whether voxels at the border lie inside.
    same = np.array_equal(affine, target_affine)
    to_source = np.eye(4) if same else scipy.linalg.inv(affine) @ target_affine
    matrix, offset = to_source[:3, :3], to_source[:3, 3]
    if np.array_equal(np.diag(np.diag(matrix)), matrix):
        matrix = np.diag(matrix)  # SciPy's faster way; it rounds halves differently, as nilearn's
    native = data.astype(data.dtype.newbyteorder("="), copy=False)
    resampled: NDArray[np.generic] = scipy.ndimage.affine_transform(
        native, matrix, offset=offset, output_shape=tuple(target_shape), order=0, cval=0
    )
    return resampled

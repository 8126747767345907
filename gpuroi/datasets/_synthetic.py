"""Synthetic statistical maps whose regions are known."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from gpuroi.checks import shown
from gpuroi.space import check_affine, sigma_voxels

if TYPE_CHECKING:
    import nibabel as nib

_VOXEL_MM = 3.0
_HEAD_MM = (0.0, -18.0, 9.0)  # about the middle of the head in MNI space
_SMALLEST_AXIS_VOXELS = 8
_PEAKS = (6.0, 1000.0)  # noise of unit variance seldom reaches half of the lowest
_HEAD = 0.46  # semi-axes of the head, as a part of the volume's edges
_EDGE = 5 / 8  # height of a blob at the edge of its region, as a part of the peak
_LARGEST_SEMI_AXIS = 1.5  # in widths at half maximum; the smallest is one such width
_ARRANGEMENTS = 10  # to try before there is said to be no room
_BEND = 0.5  # how softly values bend away from a bound, in units of the map


@dataclass(frozen=True, eq=False)
class StatMap:
    """A synthetic map and the truth about it, from `make_stat_map`.

    Attributes
    ----------
    img : nibabel.Nifti1Image
        The map ``(X, Y, Z)``.
    labels_img : nibabel.Nifti1Image
        Its regions, int32 ``(X, Y, Z)``: 0 is background, 1..n are numbered by each region's first
        voxel in C order, as gpuroi numbers what it finds.
    peaks : numpy.ndarray
        Where each region is strongest, in mm: float64 ``(n, 3)``, in the order of the labels. Of
        several voxels that are equally strong, it is the first in C order.
    threshold : float
        A height that separates the regions from everything else.

    Examples
    --------
    >>> from gpuroi.datasets import make_stat_map
    >>> truth = make_stat_map(n_regions=3)
    >>> truth.img.shape, truth.peaks.shape, truth.threshold
    ((53, 63, 46), (3, 3), 5.0)
    """

    img: "nib.Nifti1Image"
    labels_img: "nib.Nifti1Image"
    peaks: NDArray[np.float64]
    threshold: float


def make_stat_map(
    shape: Sequence[int] = (53, 63, 46),
    seed: int = 0,
    *,
    affine: ArrayLike | None = None,
    n_regions: int = 6,
    peak: float = 8.0,
    fwhm: float = 6.0,
    dtype: DTypeLike = np.float32,
) -> StatMap:
    """Return a synthetic t-map whose regions are known: smooth noise in a head, and blobs.

    The noise is Gaussian with unit variance inside an ellipsoid, outside of which the map is zero.
    Blobs are added to it, every second one negative. Each one's region is an ellipsoid, connected
    through faces, and no two regions touch, not even at corners. Values are bent so that every
    voxel of a region has a magnitude of 3/4 of `peak` or more, and every other voxel one of 1/2 of
    `peak` or less. Every threshold between the two therefore cuts out exactly the regions.

    Parameters
    ----------
    shape : three ints
        Voxels along x, y and z, 8 at least.
    seed : int
        Which map; the same one for the same seed and the other parameters. Regions are the same
        with every version of NumPy, and values up to rounding, as long as NumPy does not change
        how `numpy.random.Generator` draws.
    affine : (4, 4) array or None
        Voxel to mm. None is voxels of 3 mm, with the head about where MNI152's is.
    n_regions : int
        How many blobs; 0 makes a map of nothing but noise.
    peak : float
        How high blobs rise, in units of the noise's standard deviation: 6 to 1000. The noise comes
        on top of it.
    fwhm : float
        Smoothness of the noise in mm, as a full width at half maximum. Regions have semi-axes of
        between once and 1.5 times as much, but of one voxel at least.
    dtype : float32 or float64
        Of the map.

    Returns
    -------
    StatMap
        The map, its regions as labels, and their peaks.

    Raises
    ------
    ValueError, TypeError
        If a parameter is out of range or no number, or so many regions have no place in the head.

    Examples
    --------
    >>> from gpuroi import extract_regions
    >>> from gpuroi.datasets import make_stat_map
    >>> truth = make_stat_map((40, 48, 40), seed=1, n_regions=4)
    >>> regions = extract_regions(truth.img, threshold=truth.threshold)
    >>> bool((regions.labels_img.get_fdata() == truth.labels_img.get_fdata()).all())
    True
    """
    import nibabel as nib

    from gpuroi import io

    size = _checked_shape(shape)
    grid = _default_affine(size) if affine is None else _checked_affine(affine)
    _check_range("n_regions", n_regions, n_regions >= 0, "0 or more")
    lowest, highest = _PEAKS
    _check_range("peak", peak, lowest <= peak <= highest, f"{lowest:g} to {highest:g}")
    _check_range("fwhm", fwhm, 0 < fwhm < math.inf, "millimetres above zero")
    kind = np.dtype(dtype)
    _check_range("dtype", dtype, kind in (np.float32, np.float64), "float32 or float64")

    rng = np.random.Generator(np.random.PCG64(seed))
    blobs = _place(size, grid, n_regions, fwhm, rng)  # first, so that no rounding moves them
    values = _noise(size, sigma_voxels(fwhm, grid), rng)
    signs = np.zeros(size, np.int8)
    for blob in blobs:
        values += blob.sign * peak * _height(blob, size)
        signs.flat[blob.voxels] = blob.sign
    data = _bend(values, signs, peak).astype(kind)
    data[~_head(size)] = 0

    labels = np.zeros(size, np.int32)
    strongest = np.zeros((n_regions, 3), np.intp)
    for index, blob in enumerate(sorted(blobs, key=lambda blob: int(blob.voxels[0]))):
        labels.flat[blob.voxels] = index + 1
        magnitudes = np.abs(data.flat[blob.voxels])
        strongest[index] = np.unravel_index(blob.voxels[magnitudes.argmax()], size)
    img = nib.Nifti1Image(data, grid)
    img.header.set_xyzt_units("mm")
    return StatMap(
        img,
        io.labels_image(labels, grid, img.header),
        strongest @ grid[:3, :3].T + grid[:3, 3],
        _EDGE * peak,
    )


# Parameters ---------------------------------------------------------------------------------------


def _check_range(name: str, value: object, is_inside: object, accepted: str) -> None:
    if not is_inside:
        raise ValueError(f"{name}={shown(value)}: expected {accepted}.")


def _checked_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    sizes = tuple(int(n) for n in shape)
    if len(sizes) != 3 or min(sizes) < _SMALLEST_AXIS_VOXELS or sizes != tuple(shape):
        raise ValueError(
            f"shape={shown(shape)}: expected three whole numbers, {_SMALLEST_AXIS_VOXELS} or more."
        )
    return sizes


def _default_affine(shape: tuple[int, int, int]) -> NDArray[np.float64]:
    affine = np.diag([_VOXEL_MM, _VOXEL_MM, _VOXEL_MM, 1.0])
    middle = [_VOXEL_MM * (n // 2) for n in shape]
    affine[:3, 3] = [center - half for center, half in zip(_HEAD_MM, middle, strict=True)]
    return affine


def _checked_affine(affine: ArrayLike) -> NDArray[np.float64]:
    matrix = np.array(affine, np.float64)
    if matrix.shape != (4, 4):
        raise ValueError(f"affine={shown(affine)}: expected a 4 x 4 matrix.")
    return check_affine(matrix, "affine")


# Places -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Blob:
    """An ellipsoid along the axes of the grid, in voxels, around the middle of a voxel."""

    centre: NDArray[np.intp]
    semi_axes: NDArray[np.float64]
    sign: int
    voxels: NDArray[np.intp]  # of its region, as flat indices, ascending


def _place(
    shape: tuple[int, int, int],
    affine: NDArray[np.float64],
    n_regions: int,
    fwhm: float,
    rng: np.random.Generator,
) -> list[_Blob]:
    """Return blobs inside the head, no two of which touch, at random places."""
    voxel_mm = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    for _ in range(_ARRANGEMENTS):
        blobs = _arrange(shape, voxel_mm, n_regions, fwhm, rng)
        if len(blobs) == n_regions:
            return blobs
    raise ValueError(
        f"n_regions={n_regions}: only {len(blobs)} found a place in a head of shape {shape} with "
        f"fwhm={fwhm:g} mm and voxels of {np.round(voxel_mm, 2).tolist()} mm; ask for fewer "
        "regions, a larger shape or a smaller fwhm."
    )


def _arrange(
    shape: tuple[int, int, int],
    voxel_mm: NDArray[np.float64],
    n_regions: int,
    fwhm: float,
    rng: np.random.Generator,
) -> list[_Blob]:
    """Place one blob after the other, until there are enough or there is no room."""
    middle, head = _head_axes(shape)
    # A norm, 1 at the surface of the head: its triangle inequality keeps blobs inside.
    depth = np.sqrt(_radius_squared(middle, head, shape))
    room_mm = np.full(shape, np.inf)  # from each voxel to the nearest blob
    corner_mm = float(np.sqrt((voxel_mm**2).sum()))  # between voxels that touch at a corner
    blobs: list[_Blob] = []
    for number in range(n_regions):
        widths_mm = fwhm * (1 + (_LARGEST_SEMI_AXIS - 1) * rng.random(3))
        semi_axes = np.maximum(widths_mm / voxel_mm, 1)
        reach_mm = float((semi_axes * voxel_mm).max())
        has_room = (depth <= 1 - (semi_axes / head).max()) & (room_mm > reach_mm + corner_mm)
        places = np.flatnonzero(has_room)
        if places.size == 0:
            break
        place = places[int(rng.random() * places.size)]
        centre = np.array(np.unravel_index(place, shape))
        voxels = np.flatnonzero(_radius_squared(centre, semi_axes, shape) <= 1)
        blobs.append(_Blob(centre, semi_axes, -1 if number % 2 else 1, voxels))
        distance_mm = np.sqrt(_radius_squared(centre, 1 / voxel_mm, shape))
        room_mm = np.minimum(room_mm, distance_mm - reach_mm)
    return blobs


def _head_axes(shape: tuple[int, int, int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the middle and the semi-axes of the head, in voxels."""
    edges = np.array(shape, np.float64)
    return (edges - 1) / 2, _HEAD * edges


def _head(shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    middle, semi_axes = _head_axes(shape)
    return _radius_squared(middle, semi_axes, shape) <= 1


def _radius_squared(
    centre: NDArray[np.generic], semi_axes: NDArray[np.float64], shape: tuple[int, int, int]
) -> NDArray[np.float64]:
    """Return the squared distance of each voxel, in units of an ellipsoid's semi-axes."""
    x, y, z = _squares(centre, semi_axes, shape)
    return x + y + z


def _squares(
    centre: NDArray[np.generic], semi_axes: NDArray[np.float64], shape: tuple[int, int, int]
) -> list[NDArray[np.float64]]:
    offsets = np.ogrid[tuple(slice(n) for n in shape)]
    return [
        ((offset - middle) / semi_axis) ** 2
        for offset, middle, semi_axis in zip(offsets, centre, semi_axes, strict=True)
    ]


# Values -------------------------------------------------------------------------------------------


def _noise(
    shape: tuple[int, int, int], sigma: tuple[float, float, float], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return smooth Gaussian noise of mean 0 and variance 1 in the head."""
    from scipy import ndimage

    noise: NDArray[np.float64] = ndimage.gaussian_filter(rng.standard_normal(shape), sigma)
    in_head = noise[_head(shape)]
    noise -= in_head.mean()
    noise /= in_head.std()
    return noise


def _height(blob: _Blob, shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """Return a Gaussian of height 1 that is `_EDGE` at the edge of the blob's region."""
    x, y, z = (_EDGE**square for square in _squares(blob.centre, blob.semi_axes, shape))
    return x * y * z


def _bend(values: NDArray[np.float64], signs: NDArray[np.int8], peak: float) -> NDArray[np.float64]:
    """Return `values` bent to more than 3/4 of `peak` in regions, less than 1/2 of it elsewhere.

    `signs` is 1 or -1 in a region, and 0 elsewhere.
    """
    low, high = peak / 2, 3 * peak / 4
    outside = (_root(values + low) - _root(values - low)) / 2  # odd, slope 1 at 0, flat at low
    excess = signs * values - high
    return np.where(signs == 0, outside, signs * (high + (excess + _root(excess)) / 2))


def _root(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a smooth absolute value; unlike exponentials, square roots round the same anywhere."""
    return np.sqrt(values**2 + _BEND**2)

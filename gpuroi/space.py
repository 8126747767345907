"""Millimetres and voxels: what an affine says of a grid."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpuroi.errors import InvalidMapError


def check_affine(affine: NDArray[np.float64] | None, name: str) -> NDArray[np.float64]:
    """Return `affine` if it maps voxels to distinct places in mm; `name` is the image's."""
    if affine is None or not np.isfinite(affine).all() or np.linalg.det(affine[:3, :3]) == 0:
        raise InvalidMapError(
            f"{name}: its affine is singular or not finite, so voxels have no size in mm: "
            f"{None if affine is None else _on_one_line(affine)}."
        )
    return affine


def same_grid(
    shape: Sequence[int],
    affine: NDArray[np.float64],
    other_shape: Sequence[int],
    other_affine: NDArray[np.float64],
) -> bool:
    """Return whether two images have the same voxels (affines as close as `numpy.allclose`)."""
    if tuple(shape[:3]) != tuple(other_shape[:3]):
        return False
    # Most are equal; `allclose` takes longer than a small map's threshold.
    return np.array_equal(affine, other_affine) or np.allclose(affine, other_affine)


def difference_of_grids(
    shape: Sequence[int],
    affine: NDArray[np.float64],
    other_shape: Sequence[int],
    other_affine: NDArray[np.float64],
) -> str:
    """Return in what two images differ that are not of `same_grid`, as an error message says it."""
    if tuple(shape[:3]) != tuple(other_shape[:3]):
        return f"shape {tuple(shape)} against {tuple(other_shape)}"
    return f"affine {_on_one_line(affine)} against {_on_one_line(other_affine)}"


def _on_one_line(affine: NDArray[np.float64]) -> str:
    rows = np.array2string(affine[:3], separator=", ", max_line_width=1000)
    return " ".join(rows.split())


def voxel_volume_mm3(affine: NDArray[np.float64]) -> float:
    """Return the volume of one voxel."""
    return float(np.abs(np.linalg.det(affine[:3, :3])))


def sigma_voxels(fwhm_mm: float, affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the standard deviation along each axis, in voxels, of a Gaussian.

    `fwhm_mm` is its full width at half maximum.
    """
    voxel_mm = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    x, y, z = fwhm_mm / (np.sqrt(8 * np.log(2)) * voxel_mm)
    return float(x), float(y), float(z)

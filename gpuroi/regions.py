"""The nilearn door to regions: ``nilearn.regions`` by another import line."""

import math
import warnings
from collections.abc import Iterable, Iterator

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from gpuroi.algorithms.measure import RegionVoxels, gather
from gpuroi.arrays import check_choice
from gpuroi.backends import Backend, get_backend
from gpuroi.errors import UnsupportedMethodError
from gpuroi.masks import load_mask
from gpuroi.niimg import load_images, voxels
from gpuroi.stack import stack_image
from gpuroi.types import ImageLike

__all__ = ["connected_regions"]


def connected_regions(
    maps_img: ImageLike | Iterable[ImageLike],
    min_region_size: float = 1350,
    extract_type: str = "local_regions",
    smoothing_fwhm: float = 6,
    mask_img: ImageLike | None = None,
    *,
    backend: str | Backend = "auto",
) -> tuple[nib.Nifti1Image, list[int]] | tuple[None, None]:
    """Return the regions of thresholded maps, one volume each, and the map each came from.

    A drop-in for `nilearn.regions.connected_regions`: the same regions in the same order.

    Parameters
    ----------
    maps_img : path or nibabel image, 3-D or 4-D, or a list of them
        Maps whose background is zero. All voxels that are not zero are foreground, and positive
        ones join negative ones, as in nilearn (`gpuroi.extract_regions` keeps them apart). NaN and
        infinite voxels are background, with a warning.
    min_region_size : float
        Regions are kept that are larger than this volume in mm^3.
    extract_type : {"local_regions", "connected_components"}
        ``"local_regions"``, nilearn's default, is not part of this release.
    smoothing_fwhm : float
        In mm; for ``"local_regions"`` only.
    mask_img : path or image, optional
        Voxels outside are background; resampled (nearest) to the grid of the maps.
    backend : {"auto", "cpu", "cuda"} or Backend
        Where to label; the regions are the same everywhere.

    Returns
    -------
    regions_img : Nifti1Image (X, Y, Z, n) float32, or None if there is no region
        Lazy: see `gpuroi.stack.RegionStack`. A Nifti2Image if the maps are, or if there are more
        regions than the 32,767 volumes of NIfTI-1.
    index : list of int, or None
        For each region, the map (fourth axis of `maps_img`) that it comes from.

    Raises
    ------
    ValueError
        If `extract_type` is none of the above or `min_region_size` is NaN; InvalidMapError, a
        ValueError, if an image cannot be read; UnsupportedMethodError, a ValueError, for
        ``"local_regions"``.

    Examples
    --------
    >>> import nibabel as nib, numpy as np
    >>> from gpuroi.regions import connected_regions
    >>> img = nib.Nifti1Image(np.array([[[3.0, 3.0, 0.0, 4.0]]]), np.eye(4))
    >>> regions_img, index = connected_regions(img, 0, "connected_components")
    >>> regions_img.shape, index
    ((1, 1, 4, 2), [0, 0])
    """
    check_extract_type(extract_type)
    if math.isnan(min_region_size):
        raise ValueError(
            f"min_region_size={min_region_size!r} is no volume; pass mm^3, 0 to keep all regions."
        )
    image = load_images(maps_img)
    maps = voxels(image, copy=False)
    maps = maps[..., np.newaxis] if maps.ndim == 3 else maps
    inside = None
    if mask_img is not None:
        inside = load_mask(mask_img, maps.shape[:3], image.affine, resample=True)
    voxel_volume_mm3 = float(np.abs(np.linalg.det(image.affine[:3, :3])))
    # nilearn keeps sizes > min_region_size / volume; for whole voxels that is a lower bound.
    min_voxels = math.floor(min(float(min_region_size) / voxel_volume_mm3, maps.size)) + 1

    parts = list(_components(get_backend(backend), maps, inside, min_voxels))
    index = [number for number, part in enumerate(parts) for _ in range(len(part))]
    if not index:
        warnings.warn(
            f"no region is larger than min_region_size={min_region_size} mm^3 "
            f"({min_voxels} voxels or more); there is nothing to return.",
            UserWarning,
            stacklevel=2,
        )
        return None, None
    return stack_image(parts, image.affine, image.header), index


def check_extract_type(extract_type: str) -> None:
    """Raise if `extract_type` is unknown, or not part of this release."""
    check_choice("extract_type", extract_type, ("connected_components", "local_regions"))
    if extract_type == "local_regions":
        raise UnsupportedMethodError(
            "extract_type='local_regions' (the random walker) is not part of this release of "
            "gpuroi; pass extract_type='connected_components'."
        )


def _components(
    backend: Backend, maps: NDArray[np.generic], inside: NDArray[np.bool_] | None, min_voxels: int
) -> Iterator[RegionVoxels]:
    """Yield the connected components of each of `maps` ``(X, Y, Z, T)``."""
    n_voxels = math.prod(maps.shape[:3])
    step = max(1, backend.batch_bytes // max(1, n_voxels * 4))
    n_not_finite = 0
    for start in range(0, maps.shape[3], step):
        volumes = np.moveaxis(maps[..., start : start + step], -1, 0)
        foreground = volumes != 0
        if inside is not None:
            foreground &= inside
        n_foreground = np.count_nonzero(foreground)
        foreground &= np.isfinite(volumes)
        n_not_finite += int(n_foreground - np.count_nonzero(foreground))
        found = backend.component_voxels(
            backend.to_device(foreground.astype(np.float32)),
            np.ones(len(foreground), np.float32),
            "positive",
            6,
            min_voxels,
        )
        for volume, voxels_found in zip(volumes, found, strict=True):
            yield gather(voxels_found, volume)
    if n_not_finite:
        warnings.warn(
            f"{n_not_finite} voxels are NaN or infinite; they are background.",
            UserWarning,
            stacklevel=3,
        )

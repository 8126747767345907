"""The nilearn door to regions: ``nilearn.regions`` by another import line."""

import math
import numbers
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from gpuroi import io, words
from gpuroi.algorithms.local_regions import (
    SEED_DISTANCE_VOXELS,
    find_seeds,
    large_in_seed_order,
    warn_of_undecided,
)
from gpuroi.algorithms.measure import RegionVoxels, gather
from gpuroi.backends import Backend, LabelledVoxels, get_backend
from gpuroi.backends._memory import in_pieces
from gpuroi.checks import at_least_zero, check_choice, shown
from gpuroi.errors import warn
from gpuroi.masks import load_mask
from gpuroi.niimg import load_images, voxels
from gpuroi.recipe import METHODS
from gpuroi.space import sigma_voxels, voxel_volume_mm3
from gpuroi.stack import stack_image
from gpuroi.types import ImageLike

__all__ = ["connected_regions"]


def connected_regions(
    maps_img: ImageLike | Iterable[ImageLike],
    min_region_size: float = 1350,
    extract_type: str = "local_regions",
    smoothing_fwhm: float | None = 6,
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
        ``"local_regions"`` finds maxima of the smoothed map and lets them compete for the voxels
        by a random walker, solved exactly (nilearn stops at a relative residual of 0.001, which
        leaves voxels with the wrong label: see ``docs/deviations.md``). The method is that of
        Abraham et al., "Region segmentation for sparse decompositions", 2014,
        doi:10.1007/978-3-319-12289-2_7, the walker that of Grady, "Random Walks for Image
        Segmentation", 2006, doi:10.1109/TPAMI.2006.233.
    smoothing_fwhm : float or None
        Full width at half maximum of a Gaussian, in mm; None and 0 do not smooth. For
        ``"local_regions"`` only.
    mask_img : path or image, optional
        Voxels outside are background; resampled (nearest) to the grid of the maps.
    backend : {"auto", "cpu", "cuda"} or Backend
        Where to label; the regions are the same everywhere.

    Returns
    -------
    regions_img : Nifti1Image (X, Y, Z, n) float32, or None if there is no region
        Each region's voxels with their values, 0 elsewhere. Lazy: see `gpuroi.stack.RegionStack`.
        A Nifti2Image if the maps are, or if there are more regions than the 32,767 volumes of
        NIfTI-1.
    index : list of int, or None
        For each region, the map (fourth axis of `maps_img`) that it comes from.

    Raises
    ------
    ValueError
        If `extract_type`, `min_region_size` or `smoothing_fwhm` is none of the above;
        InvalidMapError, a ValueError, if an image cannot be read.
    TypeError
        If an image or a number is something else.
    BackendUnavailableError, UnknownBackendError, DeviceMemoryError
        If `backend` cannot run here, does not exist, or is too small for one volume.

    Examples
    --------
    >>> import nibabel as nib, numpy as np
    >>> from gpuroi.regions import connected_regions
    >>> img = nib.Nifti1Image(np.array([[[3.0, 3.0, 0.0, 4.0]]]), np.eye(4))
    >>> regions_img, index = connected_regions(img, 0, "connected_components")
    >>> regions_img.shape, index
    ((1, 1, 4, 2), [0, 0])
    """
    check_choice("extract_type", extract_type, METHODS)
    if isinstance(min_region_size, bool) or not isinstance(min_region_size, numbers.Real):
        raise TypeError(
            f"min_region_size={shown(min_region_size)} is a {type(min_region_size).__name__}; "
            "pass mm^3, 0 to keep all regions."
        )
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
    # nilearn keeps sizes > min_region_size / volume; for whole voxels that is a lower bound.
    min_size_voxels = float(min_region_size) / voxel_volume_mm3(image.affine)
    min_voxels = math.floor(min(min_size_voxels, maps.size)) + 1

    chosen = get_backend(backend)
    find: Callable[[NDArray[Any]], Iterable[LabelledVoxels]]
    if extract_type == "connected_components":
        find = partial(_components, chosen, min_voxels=min_voxels)
    else:
        asked_mm = 0.0 if smoothing_fwhm is None else smoothing_fwhm
        fwhm_mm = at_least_zero("smoothing_fwhm", asked_mm, "mm")
        sigma = sigma_voxels(fwhm_mm, image.affine)
        name = io.describe(image)
        find = partial(_local_regions, chosen, sigma=sigma, min_voxels=min_voxels, name=name)
    parts = list(_in_batches(chosen, maps, inside, find))
    index = [number for number, part in enumerate(parts) for _ in range(len(part))]
    if not index:
        warn(
            f"no region is larger than min_region_size={min_region_size} mm^3 "
            f"({min_voxels} voxels or more); there is nothing to return."
        )
        return None, None
    return stack_image(parts, image.affine, image.header), index


def _in_batches(
    backend: Backend,
    maps: NDArray[Any],
    inside: NDArray[np.bool_] | None,
    find: Callable[[NDArray[Any]], Iterable[LabelledVoxels]],
) -> Iterator[RegionVoxels]:
    """Yield what `find` finds in `maps` ``(X, Y, Z, T)``, given finite ``(B, X, Y, Z)`` of them."""
    n_voxels = math.prod(maps.shape[:3])
    step = max(1, backend.batch_bytes // max(1, n_voxels * 4))
    n_not_finite = 0
    for start in range(0, maps.shape[3], step):
        volumes = np.moveaxis(maps[..., start : start + step], -1, 0)
        if inside is not None:
            volumes = np.where(inside, volumes, volumes.dtype.type(0))
        finite = np.isfinite(volumes)
        if not finite.all():
            n_not_finite += finite.size - np.count_nonzero(finite)
            volumes = np.where(finite, volumes, volumes.dtype.type(0))
        labelled = in_pieces(backend, volumes, lambda piece: list(find(piece)))
        for volume, found in zip(volumes, labelled, strict=True):
            yield gather(found, volume)
    if n_not_finite:
        warn(f"{words.not_finite(n_not_finite)}, and background.")


def _components(
    backend: Backend, volumes: NDArray[Any], *, min_voxels: int
) -> list[LabelledVoxels]:
    """Return the connected components of each volume, whatever the signs of its voxels."""
    foreground = backend.to_device((volumes != 0).astype(np.float32))
    cutoffs = np.ones(len(volumes), np.float32)
    return backend.component_voxels(foreground, cutoffs, "positive", 6, min_voxels)


def _local_regions(
    backend: Backend,
    volumes: NDArray[Any],
    *,
    sigma: tuple[float, float, float],
    min_voxels: int,
    name: str,
) -> Iterator[LabelledVoxels]:
    """Yield the regions around the maxima of each volume, in the order of their seeds."""
    # The precision that nilearn smooths in.
    dtype = np.float64 if volumes.dtype.itemsize == 8 else np.float32
    maps = backend.to_device(volumes.astype(dtype, copy=False))
    for foreground in find_seeds(backend, maps, sigma, SEED_DISTANCE_VOXELS):
        walk = foreground.walk()
        warn_of_undecided(name, walk.confidence)
        yield large_in_seed_order(foreground.index, walk.label, min_voxels)

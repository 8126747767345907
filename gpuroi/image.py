"""The nilearn door to thresholds: ``nilearn.image.threshold_img`` by another import line."""

import math
import numbers
import os
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage
from numpy.typing import NDArray

from gpuroi import words
from gpuroi.algorithms.threshold import Threshold, cutoff_at, parse_threshold, percentile_scores
from gpuroi.arrays import computable
from gpuroi.backends import Backend, LabelledVoxels, get_backend
from gpuroi.backends._memory import in_pieces
from gpuroi.errors import warn
from gpuroi.masks import load_mask
from gpuroi.niimg import image_like, load_images, narrowed, voxels
from gpuroi.types import ImageLike, Tail

__all__ = ["threshold_img"]

#: nilearn adds this to a percentile, in map units, so that voxels exactly at it are cut off.
NILEARN_OFFSET = 1e-5


def threshold_img(
    img: ImageLike,
    threshold: float | str,
    cluster_threshold: float = 0,
    two_sided: bool = True,
    mask_img: ImageLike | None = None,
    copy: bool = True,
    copy_header: bool = True,
    *,
    backend: str | Backend = "auto",
) -> nib.Nifti1Image:
    """Return `img` with the voxels short of a threshold, and small clusters, set to zero.

    A drop-in for `nilearn.image.threshold_img`, voxel for voxel; ``docs/deviations.md`` lists the
    inputs where nilearn's answer is a defect.

    Parameters
    ----------
    img : path or nibabel image, 3-D or 4-D
    threshold : str or float
        ``"97%"`` is a percentile (of all volumes together), plus nilearn's `NILEARN_OFFSET`; a
        number is in map units, and may be below zero where `two_sided` is False.
    cluster_threshold : float
        Clusters (6-connected, of one sign) with fewer voxels are set to zero.
    two_sided : bool
        True keeps ``abs(x) >= threshold``, with percentiles of ``abs(x)``. False keeps
        ``x >= threshold`` with percentiles of ``x >= 0``, or ``x <= threshold`` below zero.
    mask_img : path or image, optional
        Voxels outside become zero and are not ranked; resampled (nearest) to the grid of `img`.
    copy : bool
        False writes into the array of an image that is in memory.
    copy_header : bool
        Whether the result keeps the header of `img`.
    backend : {"auto", "cpu", "cuda"} or Backend
        Where percentiles and clusters are computed; the result is the same everywhere.

    Returns
    -------
    image of the class of `img`
        The dtype of its voxels is that of the voxels of `img`; on disk too, where integers that
        have to be scaled could not hold the zeros.

    Raises
    ------
    ValueError
        If `threshold` is a string that is no percentile from 0% to 100%, or below zero with
        `two_sided`; InvalidMapError, a ValueError, if an image cannot be read.
    TypeError
        If `img` is no image, or a parameter of another type.
    BackendUnavailableError, UnknownBackendError, DeviceMemoryError
        If `backend` cannot run here, does not exist, or is too small for one volume.

    Examples
    --------
    >>> import nibabel as nib, numpy as np
    >>> from gpuroi.image import threshold_img
    >>> img = nib.Nifti1Image(np.array([[[1.0, -4.0, 2.0, 3.0]]]), np.eye(4))
    >>> threshold_img(img, 2.5).get_fdata()
    array([[[ 0., -4.,  0.,  3.]]])
    """
    if not isinstance(img, str | os.PathLike | SpatialImage):
        raise TypeError(
            f"img is a {type(img).__name__}; pass a path or a 3-D or 4-D nibabel image."
        )
    if (
        isinstance(cluster_threshold, bool)
        or not isinstance(cluster_threshold, numbers.Real)
        or not math.isfinite(cluster_threshold)
    ):
        raise TypeError(f"cluster_threshold={cluster_threshold!r}; pass a number of voxels >= 0.")
    parsed = parse_threshold(threshold)
    if two_sided and parsed.value < 0:
        raise ValueError(
            f"threshold={threshold!r} is below zero, which needs two_sided=False; two-sided "
            "thresholds are magnitudes."
        )
    image = load_images(img)
    data = voxels(image, copy=copy)
    _zero_not_finite(data)

    inside = None
    if mask_img is not None:
        inside = load_mask(mask_img, data.shape[:3], image.affine, resample=True)
        data[~inside] = 0
    chosen = get_backend(backend)
    cutoff = _cutoff(chosen, data if inside is None else data[inside], parsed, two_sided)
    if two_sided:
        short = (-cutoff < data) & (data < cutoff)
    else:
        short = data < cutoff if cutoff >= 0 else data > cutoff
    np.copyto(data, 0, where=short)

    if cluster_threshold > 0:
        _zero_small_clusters(chosen, data, math.ceil(cluster_threshold))
    return image_like(image, narrowed(data), copy_header=copy_header)


def _cutoff(backend: Backend, ranked: NDArray[Any], threshold: Threshold, two_sided: bool) -> float:
    """Return the value to compare voxels with; where nobody is ranked, none survives."""
    if threshold.is_percentile:
        tail: Tail = "both" if two_sided else "positive"

        def scores(maps: NDArray[Any]) -> list[float]:
            device_maps = backend.to_device(maps)
            return list(percentile_scores(backend, device_maps, threshold.value, tail)[0])

        (score,) = in_pieces(backend, computable(ranked).reshape(1, 1, 1, -1), scores)
        return math.inf if math.isnan(score) else float(score) + NILEARN_OFFSET
    value = threshold.value
    if value >= 0:
        highest = float(ranked.max()) if ranked.size else 0.0
        if two_sided and ranked.size:
            highest = max(highest, -float(ranked.min()))
        kind = "magnitude" if two_sided else "value"
        beyond = f"exceeds {highest}, the largest {kind}" if value > max(highest, 0) else None
    else:
        lowest = ranked.min(initial=0)
        beyond = f"is below {lowest}, the smallest value" if value < lowest else None
    if beyond:
        warn(f"threshold={value} {beyond} of the map; no voxel is left.")
    return value


def _zero_small_clusters(backend: Backend, data: NDArray[Any], min_voxels: int) -> None:
    """Set clusters of one sign with fewer than `min_voxels` voxels to zero, in place."""

    def clusters(maps: NDArray[Any]) -> list[LabelledVoxels]:
        any_value = cutoff_at(0, len(maps), maps.dtype)
        return backend.component_voxels(backend.to_device(maps), any_value, "both", 6, min_voxels)

    volumes = data[..., np.newaxis] if data.ndim == 3 else data
    for volume in np.moveaxis(volumes, -1, 0):
        (found,) = in_pieces(backend, computable(volume)[np.newaxis], clusters)
        small = np.ones(volume.shape, bool)
        small.ravel()[found.index] = False
        volume[small] = 0


def _zero_not_finite(data: NDArray[Any]) -> None:
    not_finite = ~np.isfinite(data)
    if not_finite.any():
        warn(f"{words.not_finite(int(np.count_nonzero(not_finite)))}, and set to zero.")
        data[not_finite] = 0

"""The native door: from maps to regions in one call."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any, Literal, TypedDict, Unpack, overload

from gpuroi import io
from gpuroi.algorithms.threshold import Threshold
from gpuroi.backends import Backend, get_backend
from gpuroi.errors import collected_warnings, warn
from gpuroi.pipeline import Prepared, extract_maps, prepare
from gpuroi.recipe import Method, make_recipe
from gpuroi.result import Regions
from gpuroi.types import Connectivity, ImageLike, Tail

__all__ = ["extract_regions"]

_MOST_READERS = 16

# Few statistics are that high, and few people ask for less.
_LOWEST_LIKELY_PERCENTILE = 50


class _Parameters(TypedDict, total=False):
    tail: Tail
    population: Literal["all", "nonzero"] | ImageLike
    mask_img: ImageLike | None
    method: Method
    connectivity: Connectivity
    min_region_size: float
    smoothing_fwhm: float
    seed_distance: int
    resample_mask: bool
    backend: str | Backend


# A list of a 4-D image, too, which its type does not tell.
@overload
def extract_regions(
    img: ImageLike, threshold: float | str = "97%", **parameters: Unpack[_Parameters]
) -> Regions | Any: ...


@overload
def extract_regions(
    img: list[Any] | tuple[Any, ...] | Iterator[Any],
    threshold: float | str = "97%",
    **parameters: Unpack[_Parameters],
) -> list[Regions]: ...


def extract_regions(
    img: ImageLike | Sequence[ImageLike] | Iterator[ImageLike],
    threshold: float | str = "97%",
    *,
    tail: Tail = "both",
    population: Literal["all", "nonzero"] | ImageLike = "all",
    mask_img: ImageLike | None = None,
    method: Method = "connected_components",
    connectivity: Connectivity = 6,
    min_region_size: float = 0.0,
    smoothing_fwhm: float = 6.0,
    seed_distance: int = 10,
    resample_mask: bool = False,
    backend: str | Backend = "auto",
) -> Regions | list[Regions]:
    """Return the regions of a map above a threshold, or of several maps.

    Parameters
    ----------
    img : path or nibabel image, 3-D or 4-D, or a sequence of them
        Statistical maps. NaN and infinite voxels are background and rank as zeros.
    threshold : str or float
        ``"97%"``: voxels strictly above the 97th percentile of the magnitudes in `tail`, taken for
        each volume with `scipy.stats.scoreatpercentile`'s interpolation. A number: voxels of at
        least that magnitude, in map units. Voxels at zero are always background.
    tail : {"both", "positive", "negative"}
        Which signs may be foreground. Opposite signs never join one region.
    population : {"all", "nonzero"} or mask image
        Voxels that a percentile ranks, within `mask_img` where one is given.
    mask_img : path or image, optional
        Voxels outside are background, and percentiles do not rank them.
    method : {"connected_components", "local_regions"}
        How foreground becomes regions: whole connected components; or local maxima of the smoothed
        magnitudes, which compete inside each component by a random walker (Abraham et al., "Region
        segmentation for sparse decompositions", 2014, doi:10.1007/978-3-319-12289-2_7; Grady,
        "Random Walks for Image Segmentation", 2006, doi:10.1109/TPAMI.2006.233).
    connectivity : {6, 18, 26}
        Neighbours that join one region: by faces, edges too, corners too.
    min_region_size : float
        Smallest volume of a region, in mm^3; a region of exactly this volume is kept.
    smoothing_fwhm : float
        Of the Gaussian before the seeds of ``"local_regions"`` are looked for: the full width at
        half maximum in mm, ``sqrt(8 * log(2))`` standard deviations. 0 does not smooth.
    seed_distance : int
        How far a seed of ``"local_regions"`` is the maximum to each side, in voxels.
    resample_mask : bool
        Bring masks that lie on another grid onto the map's by nearest neighbour; otherwise such a
        mask is an error.
    backend : {"auto", "cpu", "cuda"} or Backend
        Where to compute. The labels are the same everywhere.

    Returns
    -------
    Regions
        For one 3-D map (or a 4-D image of one volume).
    list of Regions
        For a 4-D image, one for each volume, and for a sequence, volume by volume.

    Raises
    ------
    InvalidMapError
        If a file is missing or damaged, a map is not 3-D or 4-D, complex or without a regular
        affine, or a mask does not fit.
    ValueError, TypeError
        If a parameter is not one of those above.
    BackendUnavailableError, UnknownBackendError
        If `backend` cannot run here, or does not exist.
    DeviceMemoryError
        If a single volume does not fit on the device.

    Examples
    --------
    >>> import gpuroi, nibabel as nib, numpy as np
    >>> data = np.zeros((8, 8, 8), np.float32)
    >>> data[1:4, 1:4, 1:4], data[5:7, 5:7, 5:7] = 5.0, -6.0
    >>> img = nib.Nifti1Image(data, np.diag([3.0, 3.0, 3.0, 1.0]))
    >>> regions = gpuroi.extract_regions(img, threshold=3.0, min_region_size=100)
    >>> regions.table[["label", "voxels", "volume_mm3", "peak_value"]]
       label  voxels  volume_mm3  peak_value
    0      1      27       729.0         5.0
    1      2       8       216.0        -6.0
    """
    recipe = make_recipe(
        threshold,
        tail=tail,
        population=population,
        mask_img=mask_img,
        method=method,
        connectivity=connectivity,
        min_region_size=min_region_size,
        smoothing_fwhm=smoothing_fwhm,
        seed_distance=seed_distance,
        resample_mask=resample_mask,
    )
    chosen = get_backend(backend)
    if isinstance(img, Sequence | Iterator) and not isinstance(img, str):
        if chosen.batch_bytes > 1:
            maps = _read_ahead(img)
        else:
            maps = map(prepare, chain.from_iterable(map(io.read_maps, img)))
        results = list(extract_maps(maps, recipe, chosen))
        _warn_of_missing_percent_sign(results, recipe.threshold)
        return results
    volumes = io.read_maps(img)
    results = list(extract_maps(map(prepare, volumes), recipe, chosen, len(volumes)))
    _warn_of_missing_percent_sign(results, recipe.threshold)
    return results[0] if len(results) == 1 else results


def _warn_of_missing_percent_sign(results: list[Regions], threshold: Threshold) -> None:
    """Warn where no voxel reaches a value that looks as if it was meant as a percentile."""
    if threshold.is_percentile or not _LOWEST_LIKELY_PERCENTILE <= threshold.value <= 100:
        return
    for regions in results:
        highest = regions.provenance["largest_magnitude"]
        if highest < regions.cutoff:
            warn(
                f"{regions.provenance['source']}: no voxel reaches {threshold}, the largest "
                f"magnitude is {highest:g}; for a percentile pass '{threshold}%'."
            )


def _read_ahead(sources: Iterable[ImageLike]) -> Iterator[Prepared]:
    """Yield the maps of all `sources` in order, while threads read those that come next.

    A device takes maps faster than one core decodes them. Decoders leave the interpreter to others.
    """
    n_readers = min(_MOST_READERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(n_readers) as readers:
        ahead: deque[Future[tuple[list[Prepared], list[str]]]] = deque()

        def first() -> list[Prepared]:
            prepared, messages = ahead.popleft().result()
            for message in messages:  # from here, warnings find the line of the user
                warn(message)
            return prepared

        try:
            for source in sources:
                ahead.append(readers.submit(_read, source))
                if len(ahead) > 2 * n_readers:  # as many as keep them busy, not all of a cohort
                    yield from first()
            while ahead:
                yield from first()
        finally:
            for reading in ahead:
                reading.cancel()


def _read(source: ImageLike) -> tuple[list[Prepared], list[str]]:
    """Return the maps of `source` ready for a device, and what there is to warn of."""
    with collected_warnings() as messages:
        return [prepare(one) for one in io.read_maps(source)], messages

"""The native door: from maps to regions.

Everything that knows millimetres or images happens here, before the maps go to the backend and
after the labels have come back.
"""

import importlib.metadata
import math
import numbers
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpuroi import io
from gpuroi.algorithms.measure import gather
from gpuroi.algorithms.threshold import (
    Threshold,
    cutoff_above,
    cutoff_at,
    parse_threshold,
    percentile_scores,
)
from gpuroi.arrays import check_choice, computable
from gpuroi.backends import Backend, LabelledVoxels, get_backend
from gpuroi.errors import DeviceMemoryError, UnsupportedMethodError
from gpuroi.masks import load_mask
from gpuroi.result import Regions
from gpuroi.types import (
    CONNECTIVITIES,
    TAILS,
    Connectivity,
    FloatArray,
    ImageLike,
    Tail,
)

__all__ = ["Recipe", "Regions", "extract_regions"]

Method = Literal["connected_components", "local_regions"]

# Affines in NIfTI headers are float32: a volume in mm^3 is known to about seven digits.
_VOLUME_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Recipe:
    """The checked parameters of `extract_regions`; see there."""

    threshold: Threshold
    tail: Tail = "both"
    population: Literal["all", "nonzero"] | ImageLike = "all"
    mask_img: ImageLike | None = None
    method: Method = "connected_components"
    connectivity: Connectivity = 6
    min_region_size_mm3: float = 0.0
    smoothing_fwhm_mm: float = 6.0
    seed_distance_voxels: int = 10
    resample_mask: bool = False

    def describe(self) -> dict[str, Any]:
        """Return the parameters as JSON-serialisable values, images by their names."""
        asked = {
            "threshold": str(self.threshold),
            "tail": self.tail,
            "population": self.population
            if isinstance(self.population, str)
            else io.describe(self.population),
            "mask": None if self.mask_img is None else io.describe(self.mask_img),
            "method": self.method,
            "connectivity": self.connectivity,
            "min_region_size_mm3": self.min_region_size_mm3,
        }
        if self.method == "local_regions":
            asked |= {
                "smoothing_fwhm_mm": self.smoothing_fwhm_mm,
                "seed_distance_voxels": self.seed_distance_voxels,
            }
        return asked


def extract_regions(
    img: ImageLike | Sequence[ImageLike],
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
        How foreground becomes regions.
    connectivity : {6, 18, 26}
        Neighbours that join one region: by faces, edges too, corners too.
    min_region_size : float
        Smallest volume of a region, in mm^3; a region of exactly this volume is kept.
    smoothing_fwhm, seed_distance : float (mm), int (voxels)
        Smoothing before, and window of, the seeds of ``"local_regions"``.
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
        maps = chain.from_iterable(io.read_maps(one) for one in img)
        return list(extract_maps(maps, recipe, chosen))
    volumes = io.read_maps(img)
    results = list(extract_maps(volumes, recipe, chosen))
    return results[0] if len(results) == 1 else results


def make_recipe(
    threshold: float | str = "97%",
    *,
    tail: str = "both",
    population: str | ImageLike = "all",
    mask_img: ImageLike | None = None,
    method: str = "connected_components",
    connectivity: int = 6,
    min_region_size: float = 0.0,
    smoothing_fwhm: float = 6.0,
    seed_distance: int = 10,
    resample_mask: bool = False,
) -> Recipe:
    """Return the parameters of `extract_regions`, checked; see there."""
    return Recipe(
        threshold=_magnitude_threshold(threshold),
        tail=check_choice("tail", tail, TAILS),
        population=_check_population(population),
        mask_img=mask_img,
        method=_check_method(method),
        connectivity=check_choice("connectivity", connectivity, CONNECTIVITIES),
        min_region_size_mm3=_at_least_zero("min_region_size", min_region_size, "mm^3"),
        smoothing_fwhm_mm=_at_least_zero("smoothing_fwhm", smoothing_fwhm, "mm"),
        seed_distance_voxels=seed_distance,
        resample_mask=resample_mask,
    )


def extract_maps(maps: Iterable[io.Map], recipe: Recipe, backend: Backend) -> Iterator[Regions]:
    """Yield the regions of each map, batch by batch of maps that share a grid and a dtype."""
    parameters = recipe.describe()
    for batch in _batches(map(_prepare, maps), backend.batch_bytes):
        source = batch[0].source
        masks = _Masks.load(recipe, source)
        min_voxels = _min_voxels(recipe.min_region_size_mm3, source.voxel_volume_mm3)
        host = (
            batch[0].volume[np.newaxis] if len(batch) == 1 else np.stack([m.volume for m in batch])
        )
        labelled = chain.from_iterable(_label_batch(host, masks, min_voxels, recipe, backend))
        for prepared, found in zip(batch, labelled, strict=True):
            source = prepared.source
            yield Regions(
                voxels=gather(found.voxels, prepared.volume),
                affine=source.affine,
                header=source.header,
                cutoff=found.cutoff,
                provenance={
                    "source": source.name,
                    "shape": list(source.data.shape),
                    "voxel_volume_mm3": source.voxel_volume_mm3,
                    "dtype": str(source.data.dtype),
                    "parameters": parameters,
                    "percentile_score": found.score,
                    "voxels_ranked": found.n_ranked,
                    "cutoff": found.cutoff if math.isfinite(found.cutoff) else None,
                    "min_voxels": min_voxels,
                    "voxels_not_finite": prepared.n_not_finite,
                    "largest_magnitude": prepared.largest_magnitude,
                    "regions": found.voxels.n_regions,
                    "backend": backend.name,
                    "device": backend.device,
                    "versions": _versions() | backend.versions(),
                },
            )


@dataclass(frozen=True)
class _Prepared:
    """A map as backends take it: float32 or float64 and finite."""

    source: io.Map
    volume: FloatArray
    n_not_finite: int
    largest_magnitude: float

    def fits(self, other: "_Prepared") -> bool:
        """Return whether both can go through the backend as one batch."""
        return self.volume.dtype == other.volume.dtype and io.same_grid(
            self.volume.shape, self.source.affine, other.volume.shape, other.source.affine
        )


def _prepare(source: io.Map) -> _Prepared:
    volume = computable(source.data)
    lowest, highest = volume.min(initial=0), volume.max(initial=0)
    n_not_finite = 0
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        finite = np.isfinite(volume)
        n_not_finite = int(volume.size - np.count_nonzero(finite))
        volume = np.where(finite, volume, volume.dtype.type(0))
        lowest, highest = volume.min(), volume.max()
        warnings.warn(
            f"{source.name}: {n_not_finite} voxels are NaN or infinite; they become background.",
            UserWarning,
            stacklevel=2,
        )
    return _Prepared(source, volume, n_not_finite, float(max(highest, -lowest)))


def _batches(prepared: Iterable[_Prepared], batch_bytes: int) -> Iterator[list[_Prepared]]:
    batch: list[_Prepared] = []
    for one in prepared:
        if batch and (not one.fits(batch[0]) or (len(batch) + 1) * one.volume.nbytes > batch_bytes):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


@dataclass(frozen=True)
class _Masks:
    """The masks of a recipe on the grid of a batch; None is everywhere."""

    brain: NDArray[np.bool_] | None
    population: NDArray[np.bool_] | None

    @classmethod
    def load(cls, recipe: Recipe, source: io.Map) -> "_Masks":
        def on_grid(mask: ImageLike, parameter: str) -> NDArray[np.bool_]:
            return load_mask(
                mask,
                source.data.shape,
                source.affine,
                resample=recipe.resample_mask,
                parameter=parameter,
            )

        brain = None if recipe.mask_img is None else on_grid(recipe.mask_img, "mask_img")
        if isinstance(recipe.population, str):
            return cls(brain, brain)
        population = on_grid(recipe.population, "population")
        return cls(brain, population if brain is None else population & brain)


@dataclass(frozen=True)
class _VolumeLabels:
    """What the backend said of one volume."""

    voxels: LabelledVoxels
    cutoff: float
    score: float | None
    n_ranked: int | None


def _label_batch(
    host: NDArray[Any], masks: _Masks, min_voxels: int, recipe: Recipe, backend: Backend
) -> Iterator[list[_VolumeLabels]]:
    """Yield the labels of `host` ``(B, X, Y, Z)``, in halves where the device is too small."""
    try:
        labelled = _label_on_device(host, masks, min_voxels, recipe, backend)
    except MemoryError as error:
        if len(host) == 1:
            raise DeviceMemoryError(
                f"one volume of shape {host.shape[1:]} ({host.nbytes / 2**20:.0f} MiB as "
                f"{host.dtype}) does not fit on {backend.device}: {error}. "
                "Pass backend='cpu', or free the memory that other processes hold."
            ) from error
    else:
        yield labelled
        return
    half = len(host) // 2
    for part in (host[:half], host[half:]):
        yield from _label_batch(part, masks, min_voxels, recipe, backend)


def _label_on_device(
    host: NDArray[Any], masks: _Masks, min_voxels: int, recipe: Recipe, backend: Backend
) -> list[_VolumeLabels]:
    xp = backend.xp
    maps = backend.to_device(host)
    if masks.brain is not None:
        maps = xp.where(backend.to_device(masks.brain), maps, maps.dtype.type(0))

    scores: list[float | None] = [None] * len(host)
    n_ranked: list[int | None] = [None] * len(host)
    if recipe.threshold.is_percentile:
        population = None
        if masks.population is not None:
            population = xp.broadcast_to(backend.to_device(masks.population), maps.shape)
        exact_scores, ranked = percentile_scores(
            backend,
            maps,
            recipe.threshold.value,
            recipe.tail,
            population,
            nonzero_only=isinstance(recipe.population, str) and recipe.population == "nonzero",
        )
        cutoffs = cutoff_above(exact_scores, host.dtype)
        scores = [None if math.isnan(score) else score for score in exact_scores.tolist()]
        n_ranked = ranked.tolist()
    else:
        cutoffs = cutoff_at(recipe.threshold.value, len(host), host.dtype)

    found = backend.component_voxels(maps, cutoffs, recipe.tail, recipe.connectivity, min_voxels)
    return [
        _VolumeLabels(*volume)
        for volume in zip(found, cutoffs.tolist(), scores, n_ranked, strict=True)
    ]


def _min_voxels(min_region_size_mm3: float, voxel_volume_mm3: float) -> int:
    return math.ceil(min_region_size_mm3 / voxel_volume_mm3 * (1 - _VOLUME_TOLERANCE))


@cache
def _versions() -> dict[str, str]:
    from gpuroi import __version__

    return {"gpuroi": __version__, "nibabel": importlib.metadata.version("nibabel")}


def _magnitude_threshold(threshold: float | str) -> Threshold:
    parsed = parse_threshold(threshold)
    if parsed.value < 0:
        raise ValueError(
            f"threshold={threshold!r} is below zero; a threshold is a magnitude. For values below "
            f"zero pass threshold={-parsed.value:g} with tail='negative'."
        )
    return parsed


def _check_population(population: Any) -> Any:
    if isinstance(population, str) and population not in ("all", "nonzero"):
        if not Path(population).expanduser().exists():
            raise ValueError(
                f"population={population!r} is neither 'all' nor 'nonzero', nor an existing file."
            )
        return Path(population)
    return population


def _at_least_zero(parameter: str, value: float, unit: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{parameter}={value!r} is a {type(value).__name__}; pass {unit} >= 0.")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{parameter}={value!r} is not a finite number >= 0 (in {unit}).")
    return float(value)


def _check_method(method: str) -> Method:
    check_choice("method", method, ("connected_components", "local_regions"))
    if method == "local_regions":
        raise UnsupportedMethodError(
            "method='local_regions' (the random walker) is not part of this release of gpuroi; "
            "pass method='connected_components'."
        )
    return "connected_components"

"""From maps in memory to `Regions`: batches, masks, the backend's steps, provenance.

The one place where the native door hands maps to a backend, and where millimetres become voxels.
"""

import importlib.metadata
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpuroi import io, words
from gpuroi.algorithms.local_regions import Contest, find_seeds, warn_of_undecided
from gpuroi.algorithms.measure import gather
from gpuroi.algorithms.threshold import cutoff_above, cutoff_at, one_sided, percentile_scores
from gpuroi.arrays import computable
from gpuroi.backends import Backend, LabelledVoxels, Staging, _keys
from gpuroi.backends._memory import in_pieces
from gpuroi.errors import collected_warnings, warn
from gpuroi.masks import load_mask
from gpuroi.recipe import Recipe
from gpuroi.result import Regions
from gpuroi.space import same_grid, sigma_voxels
from gpuroi.types import Array, FloatArray, ImageLike

_T = TypeVar("_T")

#: Threads that put batches together: a few take all that memory can give.
COPIERS = 4

# Threads that measure what a device has found.
_MEASURERS = min(16, os.cpu_count() or 1)

# Affines in NIfTI headers are float32: a volume in mm^3 is known to about seven digits.
_VOLUME_TOLERANCE = 1e-6


def extract_maps(
    maps: Iterable["Prepared"], recipe: Recipe, backend: Backend, at_most: int | None = None
) -> Iterator[Regions]:
    """Yield the regions of each map; `at_most` says how many there are where that is known.

    A host takes them one by one. A device takes batches of maps that share a grid and a dtype: one
    is copied while the one before is worked on, and threads measure what was found before that.
    """
    parameters = recipe.describe()
    finder = Finder(recipe, backend)
    if backend.batch_bytes == 1:
        for prepared in maps:
            (found,) = finder([prepared])
            yield finish(prepared, found, recipe, parameters, finder.computed_by)
        return

    def measured(prepared: Prepared, found: Found) -> tuple[Regions, list[str]]:
        with collected_warnings() as messages:
            return finish(prepared, found, recipe, parameters, finder.computed_by), messages

    with ThreadPoolExecutor(COPIERS) as copiers, ThreadPoolExecutor(_MEASURERS) as measurers:

        def measure(prepared: Prepared, found: Found) -> Future[tuple[Regions, list[str]]]:
            return measurers.submit(measured, prepared, found)

        batches = _one_ahead(_under_way(maps, finder, copiers, at_most))
        try:
            for ending in _one_ahead(_being_measured(batches, finder, measure)):
                for one in ending:
                    regions, messages = one.result()
                    for message in messages:  # from here, warnings find the line of the user
                        warn(message)
                    yield regions
        finally:
            measurers.shutdown(cancel_futures=True)


def _under_way(
    maps: Iterable["Prepared"], finder: "Finder", copiers: Executor, at_most: int | None
) -> Iterator[tuple[list["Prepared"], "Upload"]]:
    """Yield batches as soon as they begin to be copied to the device."""
    filling: _Filling | None = None
    for one in maps:
        if filling is not None and not filling.takes(one):
            yield filling.send()
            filling = None
        if filling is None:
            filling = _Filling(one, finder, copiers, at_most)
        filling.add(one)
    if filling is not None:
        yield filling.send()


class _Filling:
    """A batch that threads put together where the device is going to copy it from."""

    def __init__(
        self, first: "Prepared", finder: "Finder", copiers: Executor, at_most: int | None
    ) -> None:
        volume = first.volume
        size = max(1, finder.batch_bytes // max(1, volume.nbytes))
        size = size if at_most is None else min(size, at_most)
        self._finder = finder
        self._copiers = copiers
        self._batch: list[Prepared] = []
        self._copies: list[Future[None]] = []
        self._staging = finder.staging((size, *volume.shape), volume.dtype)

    def takes(self, one: "Prepared") -> bool:
        """Return whether there is room for a map, and it can go with the others."""
        return len(self._batch) < len(self._staging.host) and one.fits(self._batch[0])

    def add(self, one: "Prepared") -> None:
        place = self._staging.host[len(self._batch)]
        self._batch.append(one)
        self._copies.append(self._copiers.submit(np.copyto, place, one.volume))

    def send(self) -> tuple[list["Prepared"], "Upload"]:
        for copy in self._copies:
            copy.result()
        return self._batch, self._finder.begin(self._staging, len(self._batch))


def _one_ahead(items: Iterable[_T]) -> Iterator[_T]:
    """Yield `items`, each after the next one has been made: what was begun for it goes on."""
    made: list[_T] = []
    try:
        for item in items:
            made.append(item)
            if len(made) == 2:
                yield made.pop(0)
    except Exception:
        yield from made  # what came before the failure is not lost to it
        raise
    yield from made


def _being_measured(
    batches: Iterable[tuple[list["Prepared"], "Upload"]],
    finder: "Finder",
    measure: Callable[["Prepared", "Found"], _T],
) -> Iterator[list[_T]]:
    """Yield for each batch what `measure` returns of its maps, called when the device is done.

    The device is talked to by the calling thread alone: it is the one whose current device and
    memory pool the caller has chosen.
    """
    for batch, upload in batches:
        found = finder.find(upload, batch[0].source)
        yield [measure(*one) for one in zip(batch, found, strict=True)]


@dataclass(frozen=True)
class Prepared:
    """A map as backends take it: float32 or float64 and finite."""

    source: io.Map
    volume: FloatArray
    n_not_finite: int
    largest_magnitude: float

    def fits(self, other: "Prepared") -> bool:
        """Return whether both can go through the backend as one batch."""
        return self.volume.dtype == other.volume.dtype and _same_grid(self.source, other.source)


@dataclass(frozen=True)
class Upload:
    """A batch on its way to the device."""

    host: NDArray[Any]  # (B, X, Y, Z)
    arrived: Callable[[], Array]


@dataclass(frozen=True)
class Found:
    """What the backend found in one volume: regions, or the sides whose seeds still compete."""

    cutoff: float
    score: float | None
    n_ranked: int | None
    voxels: LabelledVoxels | Contest
    keeps_all: bool  # that is not zero, because a percentile is


@dataclass(frozen=True)
class ComputedBy:
    """What the provenance says of where regions were found.

    A backend says it of the device that is current in the thread that asks: not in every other.
    """

    name: str
    device: str
    versions: dict[str, str]

    @classmethod
    def of(cls, backend: Backend) -> "ComputedBy":
        """Return what a backend says of itself in this thread."""
        return cls(backend.name, backend.device, backend.versions())


class Finder:
    """Runs the backend's steps of one recipe on batches of maps.

    Attributes
    ----------
    batch_bytes : int
        How much it likes to be given at once: less, once the device had no room for as much.
    """

    def __init__(self, recipe: Recipe, backend: Backend) -> None:
        self._recipe = recipe
        self._backend = backend
        self.computed_by = ComputedBy.of(backend)
        self.batch_bytes = backend.batch_bytes
        self._masks_of = _masks_by_grid(recipe)

    def __call__(self, batch: list[Prepared]) -> list[Found]:
        """Return what is in each map of a batch of one grid and dtype."""
        if len(batch) == 1:
            host = batch[0].volume[np.newaxis]
            upload = Upload(host, partial(self._backend.to_device, host))
        else:
            first = batch[0].volume
            staging = self.staging((len(batch), *first.shape), first.dtype)
            for place, prepared in zip(staging.host, batch, strict=True):
                place[...] = prepared.volume
            upload = self.begin(staging, len(batch))
        return self.find(upload, batch[0].source)

    def staging(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Staging:
        """Return memory to put a batch ``(B, X, Y, Z)`` together in."""
        n, x, y, z = shape
        return self._backend.staging((n, x, y, z), dtype)

    def begin(self, staging: Staging, n: int) -> Upload:
        """Begin to copy a batch of n maps; if there is no room yet, when it is needed."""
        host = staging.host[:n]
        try:
            return Upload(host, staging.send(n))
        except MemoryError:
            self._ask_for_less(host)
            return Upload(host, partial(self._backend.to_device, host))

    def find(self, upload: Upload, source: io.Map) -> list[Found]:
        """Return what is in each map of a batch, all on the grid of `source`."""
        masks = self._masks_of(source)

        def step(piece: NDArray[Any]) -> list[Found]:
            try:
                maps = upload.arrived() if piece is upload.host else self._backend.to_device(piece)
                return _found(maps, source, masks, self._recipe, self._backend)
            except MemoryError:
                self._ask_for_less(piece)
                raise

        return in_pieces(self._backend, upload.host, step)

    def _ask_for_less(self, refused: NDArray[Any]) -> None:
        if len(refused) > 1:
            self.batch_bytes = min(self.batch_bytes, refused.nbytes // 2)


def prepare(source: io.Map) -> Prepared:
    """Return `source` with voxels that are not finite as background; warn of them."""
    volume = computable(source.data)
    lowest, highest = volume.min(initial=0), volume.max(initial=0)
    n_not_finite = 0
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        finite = np.isfinite(volume)
        n_not_finite = int(volume.size - np.count_nonzero(finite))
        volume = np.where(finite, volume, volume.dtype.type(0))
        lowest, highest = volume.min(), volume.max()
        warn(f"{source.name}: {words.not_finite(n_not_finite)}, and become background.")
    return Prepared(source, volume, n_not_finite, float(max(highest, -lowest)))


def in_batches(prepared: Iterable[Prepared], batch_bytes: int) -> Iterator[list[Prepared]]:
    """Yield runs of maps of one grid and dtype, of no more than `batch_bytes` or one map each."""
    batch: list[Prepared] = []
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


def _masks_by_grid(recipe: Recipe) -> Callable[[io.Map], _Masks]:
    """Return a function that loads the masks for a map, anew only when the grid changes."""
    latest: list[tuple[io.Map, _Masks]] = []

    def masks_of(source: io.Map) -> _Masks:
        if not latest or not _same_grid(source, latest[0][0]):
            latest[:] = [(source, _Masks.load(recipe, source))]
        return latest[0][1]

    return masks_of


def _same_grid(one: io.Map, other: io.Map) -> bool:
    return same_grid(one.data.shape, one.affine, other.data.shape, other.affine)


def _found(
    maps: Array, source: io.Map, masks: _Masks, recipe: Recipe, backend: Backend
) -> list[Found]:
    """Threshold `maps` ``(B, X, Y, Z)``, and find regions or seeds."""
    xp = backend.xp
    if masks.brain is not None:
        maps = xp.where(backend.to_device(masks.brain), maps, maps.dtype.type(0))

    scores: list[float | None] = [None] * len(maps)
    n_ranked: list[int | None] = [None] * len(maps)
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
        cutoffs = cutoff_above(exact_scores, maps.dtype)
        scores = [None if math.isnan(score) else score for score in exact_scores.tolist()]
        n_ranked = ranked.tolist()
    else:
        cutoffs = cutoff_at(recipe.threshold.value, len(maps), maps.dtype)

    found: list[LabelledVoxels | Contest]
    if recipe.method == "local_regions":
        found = _contests(maps, cutoffs, source, recipe, backend)
    else:
        min_voxels = _min_voxels(recipe, source)
        found = [
            *backend.component_voxels(maps, cutoffs, recipe.tail, recipe.connectivity, min_voxels)
        ]
    keep_all = np.zeros(len(maps), bool)
    if 0 in scores and recipe.threshold.value > 0:
        kept = _keys.reaches(xp, maps, cutoffs, recipe.tail).any(axis=(1, 2, 3))
        keep_all = backend.to_host(kept) & np.array([score == 0 for score in scores])
    each = zip(cutoffs.tolist(), scores, n_ranked, found, keep_all.tolist(), strict=True)
    return [Found(*one) for one in each]


def _contests(
    maps: Array, cutoffs: FloatArray, source: io.Map, recipe: Recipe, backend: Backend
) -> list[LabelledVoxels | Contest]:
    """Find the seeds of each volume, each sign of the tail on its own, by magnitude."""
    sigma = sigma_voxels(recipe.smoothing_fwhm_mm, source.affine)
    sides = [
        list(find_seeds(backend, side, sigma, recipe.seed_distance_voxels))
        for side in one_sided(backend, maps, cutoffs, recipe.tail)
    ]
    return [Contest(volume) for volume in zip(*sides, strict=True)]


def _min_voxels(recipe: Recipe, source: io.Map) -> int:
    exact = recipe.min_region_size_mm3 / source.voxel_volume_mm3
    more_than_there_are = math.prod(source.data.shape) + 1
    return math.ceil(min(exact * (1 - _VOLUME_TOLERANCE), more_than_there_are))


def finish(
    prepared: Prepared,
    found: Found,
    recipe: Recipe,
    parameters: dict[str, Any],
    computed_by: ComputedBy,
) -> Regions:
    """Return the regions of a map: what was found, settled, with its values and provenance.

    `parameters` are those of ``recipe.describe()``, made once for many maps.
    """
    source = prepared.source
    min_voxels = _min_voxels(recipe, source)
    walks: dict[str, Any] = {}
    packages = ["nibabel"]
    if isinstance(found.voxels, LabelledVoxels):
        voxels = found.voxels
    else:
        voxels, confidence = found.voxels.settle(min_voxels)
        warn_of_undecided(source.name, confidence)
        walks = {"random_walker": asdict(confidence)}
        packages += ["cvxopt"] * ("cholmod" in confidence.solvers)
    if found.keeps_all:
        advice = "; population='nonzero' ranks only those others"
        warn(
            f"{source.name}: at least {recipe.threshold} of the voxels ranked are zero, so that "
            f"all others are kept{advice if recipe.population == 'all' else ''}."
        )
    return Regions(
        voxels=gather(voxels, prepared.volume),
        affine=source.affine,
        header=source.header,
        cutoff=found.cutoff,
        provenance={
            "source": source.name if source.sha256 is None else str(Path(source.name).absolute()),
            "source_sha256": source.sha256,
            "shape": list(source.data.shape),
            "voxel_volume_mm3": source.voxel_volume_mm3,
            "dtype": str(source.data.dtype),
            "parameters": dict(parameters),
            "percentile_score": found.score,
            "voxels_ranked": found.n_ranked,
            "cutoff": found.cutoff if math.isfinite(found.cutoff) else None,
            "min_voxels": min_voxels,
            "voxels_not_finite": prepared.n_not_finite,
            "largest_magnitude": prepared.largest_magnitude,
            "regions": voxels.n_regions,
            **walks,
            "backend": computed_by.name,
            "device": computed_by.device,
            "versions": _versions(*packages) | computed_by.versions,
        },
    )


@cache
def _versions(*packages: str) -> dict[str, str]:
    from gpuroi import __version__

    return {"gpuroi": __version__} | {name: importlib.metadata.version(name) for name in packages}

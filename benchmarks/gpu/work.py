"""The cases: how many maps of which size, and what is asked about them."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.gpu.device import CUPY, Device
from gpuroi.algorithms.threshold import cutoff_above, percentile_scores
from gpuroi.types import Array, FloatArray

PERCENTILE, MIN_REGION_MM3, FWHM_MM, SEED_DISTANCE_VOXELS = 97.0, 200.0, 6.0, 10
SEED_FLOOR = 0.1  # of gpuroi.algorithms.local_regions, which needs threadpoolctl

STAGE_NEEDS_S = 5.0
SUITE, FILES, REQUIRED = "suite", "end-to-end", "GPUROI_REQUIRE=cuda"
DOOR, BY_HAND, COHORT = "extract_regions", "threads and verbs", "extract_cohort"
#: What is timed of each verb whose kernels are chosen, or not, as one.
VERB_STAGES = {
    "order_statistics": ("order_statistics",),
    "components": ("components", "component_voxels"),
    "smooth": ("smooth",),
    "local_maxima": ("local_maxima",),
}
STAGES = tuple(stage for stages in VERB_STAGES.values() for stage in stages)


@dataclass(frozen=True)
class Case:
    """Maps of one size, the stages they go through, and the seconds that takes at most."""

    name: str
    n_maps: int
    shape: tuple[int, int, int]
    voxel_mm: float
    needs_s: float
    stages: tuple[str, ...] = STAGES[:2]

    @property
    def min_voxels(self) -> int:
        """Voxels of the smallest region that is kept."""
        return math.ceil(MIN_REGION_MM3 / self.voxel_mm**3)

    def record(self) -> dict[str, Any]:
        """Return what a record says of the maps."""
        return {"case": self.name, "maps": self.n_maps, "shape": self.shape}


#: Most important first: whatever the time does not suffice for comes last.
CASES = (
    Case("2mm-1000", 1000, (91, 109, 91), 2.0, 60, STAGES),
    Case(FILES, 512, (91, 109, 91), 2.0, 60, ()),
    Case("3mm-10000", 10_000, (53, 63, 46), 3.0, 40, STAGES),
    Case("1024cubed", 1, (1024, 1024, 1024), 1.0, 60),
    Case("1mm-1", 1, (182, 218, 182), 1.0, 15),
    Case("2mm-256", 256, (91, 109, 91), 2.0, 15),
    Case("2mm-16", 16, (91, 109, 91), 2.0, 10),
    Case("2mm-1", 1, (91, 109, 91), 2.0, 10),
)


@dataclass(frozen=True)
class Batch:
    """Maps of a case, and what the verbs are asked about them."""

    maps: Array  # (B, X, Y, Z) float32
    ranks: np.ndarray  # (B, 2)
    cutoffs: FloatArray  # (B,)
    floors: FloatArray  # (B,)
    sigma_voxels: tuple[float, float, float]
    min_voxels: int

    def of(self, volumes: range) -> "Batch":
        """Return the part with these volumes."""
        where = slice(volumes.start, volumes.stop, volumes.step)
        host = {name: getattr(self, name)[where].copy() for name in ("ranks", "cutoffs", "floors")}
        return replace(self, maps=self.maps[where], **host)


def smooth_noise(device: Device, shape: tuple[int, int, int], seed: int) -> Array:
    """Return hashed indices, smoothed by two box filters to noise of standard deviation 1."""
    xp = device.xp
    bits = xp.arange(math.prod(shape), dtype=np.uint32)
    bits += np.uint32(seed * 0x9E3779B9 % 2**32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits ^= bits >> np.uint32(shift)
        bits *= np.uint32(factor)
    noise = (bits.astype(np.float32) / np.float32(2**32) - np.float32(0.5)).reshape(shape)
    for _ in range(2):
        noise = device.ndimage.uniform_filter(noise, 5, mode="wrap")
    return noise / xp.std(noise)


def make_batch(device: Device, case: Case) -> Batch:
    """Return maps that are smooth noise in an ellipsoid and zero outside, no two alike."""
    xp = device.xp
    distinct = [smooth_noise(device, case.shape, seed) for seed in range(min(4, case.n_maps))]
    across = (((xp.arange(n, dtype=np.float32) + 0.5) / n - 0.5) / 0.42 for n in case.shape)
    x, y, z = (axis**2 for axis in across)
    inside = x[:, None, None] + y[:, None] + z <= 1
    maps = xp.empty((case.n_maps, *case.shape), np.float32)
    for b in range(case.n_maps):
        turn, which = divmod(b, len(distinct))
        rolled = xp.roll(distinct[which], (7 * turn, 3 * turn, 5 * turn), (0, 1, 2))
        scale = np.float32((1 + b % 17 / 16) * (-1) ** turn)
        maps[b] = xp.where(inside, rolled * scale, np.float32(0))
    scores, _ = percentile_scores(device.backends[CUPY], maps, PERCENTILE, "both")
    cutoffs = cutoff_above(scores, maps.dtype)
    place = PERCENTILE / 100 * (math.prod(case.shape) - 1)
    ranks = np.tile([int(place), math.ceil(place)], (case.n_maps, 1))
    sigma = FWHM_MM / (math.sqrt(8 * math.log(2)) * case.voxel_mm)
    return Batch(maps, ranks, cutoffs, np.zeros_like(cutoffs), (sigma,) * 3, case.min_voxels)


def every_nth(n_maps: int, at_most: int) -> range:
    """Return at most so many volumes, evenly spaced, the last one among them."""
    step = math.ceil(n_maps / at_most)
    return range((n_maps - 1) % step, n_maps, step)

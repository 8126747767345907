"""What a provenance says, in words: for the screen and for the report."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpuroi.types import Provenance

# By tail: what reaches a value, and what lies above a percentile.
_REACH = {
    "both": ("|value| ≥", "|value| >"),
    "positive": ("value ≥", "value >"),
    "negative": ("value ≤", "value <"),
}


def counted(n: int, noun: str) -> str:
    """Return `n` with its noun: 1 map, 40,000 maps."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def not_finite(n: int) -> str:
    """Return what a warning says of `n` voxels."""
    return f"{counted(n, 'voxel')} {'is' if n == 1 else 'are'} NaN or infinite"


def cutoff_of(provenance: "Provenance") -> float:
    """Return the magnitude that voxels had to reach; JSON has no infinity."""
    cutoff: float | None = provenance["cutoff"]
    return math.inf if cutoff is None else cutoff


def what_was_found(provenance: "Provenance") -> str:
    """Return how many regions of what size there are, and from which value on."""
    score, tail = provenance["percentile_score"], provenance["parameters"]["tail"]
    is_above = score is not None
    magnitude: float = score if is_above else cutoff_of(provenance)
    value = 0.0 - magnitude if tail == "negative" else magnitude
    return (
        f"{counted(provenance['regions'], 'region')} of at least {smallest_region(provenance)} at "
        f"{_REACH[tail][is_above]} {value:.6g}"
    )


def threshold_asked(provenance: "Provenance") -> str:
    """Return the threshold as the user may have typed it: 97% or 3."""
    return str(provenance["parameters"]["threshold"]).removesuffix(".0")


def smallest_region(provenance: "Provenance") -> str:
    """Return the volume that a region had to have."""
    return f"{provenance['parameters']['min_region_size']:g} mm³"

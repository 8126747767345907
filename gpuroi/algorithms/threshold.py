"""Percentiles and cut-offs, exact and the same on every backend."""

import math
import numbers
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuroi.backends import Backend, _keys
from gpuroi.types import Array, FloatArray, Tail

# Not all that Python reads as a number: "9_7" is a slip of the finger.
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|nan|inf")


@dataclass(frozen=True)
class Threshold:
    """A threshold as asked for: a percentile, or a value in the units of the map."""

    value: float
    is_percentile: bool

    def __str__(self) -> str:
        return repr(self.value).removesuffix(".0") + "%" * self.is_percentile


def parse_threshold(threshold: float | str) -> Threshold:
    """Return `threshold` understood: ``"97%"`` is a percentile, a number is a value.

    Raises
    ------
    ValueError
        If a string is not a number from 0 to 100 followed by a percent sign, or a number is NaN.
    TypeError
        If it is neither a string nor a real number (True and False are not).
    """
    if isinstance(threshold, str):
        accepted = "pass a percentile such as '97%' (0% to 100%), or a number in map units"
        number = threshold.strip().removesuffix("%")
        if not _NUMBER.fullmatch(number.strip()):
            raise ValueError(
                f"threshold={threshold!r} is no number followed by a percent sign; {accepted}."
            )
        value = float(number)
        if not threshold.strip().endswith("%"):
            percent = f"{100 * value:.6g}" if 0 < value < 1 else number
            if not 0 <= float(percent) <= 100:
                raise ValueError(f"threshold={threshold!r} is text; {accepted}.")
            raise ValueError(
                f"threshold={threshold!r} has no percent sign; pass '{percent}%' for a "
                f"percentile or the number {number} for a value in map units."
            )
        if not 0 <= value <= 100:
            raise ValueError(f"threshold={threshold!r} is outside 0% to 100%; {accepted}.")
        return Threshold(value, is_percentile=True)
    if isinstance(threshold, bool | np.bool_) or not isinstance(threshold, numbers.Real):
        raise TypeError(
            f"threshold={threshold!r} is a {type(threshold).__name__}; pass a percentile such as "
            "'97%', or a number in map units."
        )
    if math.isnan(threshold):
        raise ValueError(f"threshold={threshold!r} is not a number that voxels can reach.")
    return Threshold(float(threshold), is_percentile=False)


def percentile_scores(
    backend: Backend,
    maps: Array,
    percentile: float,
    tail: Tail,
    population: Array | None = None,
    *,
    nonzero_only: bool = False,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return each volume's percentile of magnitudes in `tail`, and how many voxels were ranked.

    Parameters
    ----------
    maps : float array (B, X, Y, Z) of `backend`
    tail : {"both", "positive", "negative"}
        Ranks ``abs(x)`` of all voxels, of those at or above zero, or of those at or below zero.
    population : bool array (B, X, Y, Z) of `backend`, optional
        Ranks only these voxels.
    nonzero_only : bool
        Ranks no voxels at zero.

    Returns
    -------
    scores : float64 array (B,) on the host
        Equal to `scipy.stats.scoreatpercentile` of the ranked magnitudes; NaN where none is.
    n_ranked : int64 array (B,)
    """
    members = population
    for condition in _conditions(maps, tail, nonzero_only):
        members = condition if members is None else members & condition
    if members is None:
        n_ranked = np.full(len(maps), math.prod(maps.shape[1:]), np.int64)
    else:
        n_ranked = backend.to_host(members.sum(axis=(1, 2, 3))).astype(np.int64)
    scores = np.full(len(maps), np.nan)
    somebody = np.flatnonzero(n_ranked)
    if somebody.size == 0:
        return scores, n_ranked
    if somebody.size < len(maps):
        chosen = backend.xp.asarray(somebody)
        maps = maps[chosen]
        members = None if members is None else members[chosen]
    places = [percentile / 100.0 * (n - 1) for n in n_ranked[somebody].tolist()]
    ranks = [(int(place), math.ceil(place)) for place in places]
    statistics = backend.order_statistics(
        maps, np.array(ranks), absolute=tail != "positive", population=members
    )
    scores[somebody] = [
        between(lower, upper, place)
        for (lower, upper), place in zip(statistics.tolist(), places, strict=True)
    ]
    return scores, n_ranked


def between(lower: float, upper: float, place: float) -> float:
    """Return the value at `place` among sorted ones, whose neighbours are `lower` and `upper`.

    The arithmetic of `scipy.stats.scoreatpercentile`, operation by operation, in float64.
    """
    rank = int(place)
    if rank == place:
        return lower
    lower_weight, upper_weight = (rank + 1) - place, place - rank
    return (lower * lower_weight + upper * upper_weight) / (lower_weight + upper_weight)


def _conditions(maps: Array, tail: Tail, nonzero_only: bool) -> Iterator[Array]:
    """Yield where voxels lie in `tail`, zero included, and where they are not zero, if asked.

    By the bits, because devices flush denormals to zero when they compare floats.
    """
    if tail == "both" and not nonzero_only:
        return
    zero = _keys.magnitude(maps) == 0
    if tail != "both":
        is_negative = _keys.bits(maps) < 0
        yield zero | (is_negative if tail == "negative" else ~is_negative)
    if nonzero_only:
        yield ~zero


def cutoff_above(scores: NDArray[np.float64], dtype: np.dtype) -> FloatArray:
    """Return the smallest values of `dtype` above `scores`: ``x >= cutoff`` is ``x > score``.

    Strictly above the percentile, so that zeros stay background when most of a map is zero, and a
    constant map has no region. NaN, the score of nobody, gives infinity: no voxel reaches it.
    """
    with np.errstate(over="ignore"):  # above the largest number there is infinity
        rounded = np.maximum(scores, 0).astype(dtype)
        above = np.where(rounded > scores, rounded, np.nextafter(rounded, dtype.type(np.inf)))
    return np.where(np.isnan(scores), dtype.type(np.inf), above).astype(dtype)


def cutoff_at(value: float, n: int, dtype: np.dtype) -> FloatArray:
    """Return `value` n times as `usable_cutoffs`."""
    return usable_cutoffs(np.full(n, value), dtype)


def usable_cutoffs(values: NDArray[np.float64], dtype: np.dtype) -> FloatArray:
    """Return `values` rounded to `dtype`, at least its smallest number above zero.

    So voxels at zero stay background. NaN gives infinity.
    """
    with np.errstate(over="ignore"):
        rounded = values.astype(dtype)
    at_least = np.maximum(rounded, np.finfo(dtype).smallest_subnormal)
    cutoffs: FloatArray = np.where(np.isnan(values), dtype.type(np.inf), at_least).astype(dtype)
    return cutoffs


def one_sided(backend: Backend, maps: Array, cutoffs: FloatArray, tail: Tail) -> Iterator[Array]:
    """Yield the magnitudes of `maps` ``(B, X, Y, Z)`` that reach `cutoffs`, sign by sign.

    Zero elsewhere; the positive side first.
    """
    xp = backend.xp
    each: tuple[Tail, ...] = ("positive", "negative") if tail == "both" else (tail,)
    for side in each:
        magnitudes = _keys.magnitude(maps).view(maps.dtype.name)  # xp.abs may flush denormals
        yield xp.where(_keys.reaches(xp, maps, cutoffs, side), magnitudes, maps.dtype.type(0))

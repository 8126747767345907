"""Questions to a backend, random and special ones, with the answers of NumPy, SciPy or cc3d."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gpuroi.backends import LabelledVoxels
from gpuroi.backends.cpu import CpuBackend
from gpuroi.testing import make_maps
from gpuroi.types import CONNECTIVITIES, TAILS

_CPU = CpuBackend()


class Case(NamedTuple):
    """A verb and what it is called with; without an answer, that of the CPU backend is right."""

    verb: str
    arguments: tuple
    answer: Any = None

    def check(self, *backends):
        """Assert that each of the backends gives the answer."""
        answer = self.answer
        if answer is None:
            answer = getattr(_CPU, self.verb)(*self.arguments)
        for backend in backends:
            assert_same(getattr(backend, self.verb)(*self.arguments), answer)


def assert_same(actual, expected):
    """Assert that two answers are equal, arrays with their dtypes."""
    if isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(actual, expected, strict=True)
    elif isinstance(expected, LabelledVoxels):
        assert_same(actual.index, expected.index)
        assert_same(actual.label, expected.label)
        assert actual.n_regions == expected.n_regions
    else:
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)


def _choice(rng, of):
    return of[rng.integers(len(of))]


def _order_statistics(maps, rng):
    sizes = np.full(len(maps), maps[0].size)
    population = None
    if rng.random() < 0.5:
        population = rng.random(maps.shape) < rng.random()
        population.reshape(len(maps), -1)[:, rng.integers(maps[0].size)] = True
        sizes = population.sum(axis=(1, 2, 3))
    sizes = sizes[:, np.newaxis]
    if rng.random() < 0.5:  # what percentiles ask for: one selection finds both
        lower = rng.integers(0, sizes)
        ranks = np.hstack([lower, np.minimum(lower + 1, sizes - 1)])
    else:
        ranks = np.sort(rng.integers(0, sizes, (len(maps), rng.integers(1, 5))), axis=1)
    return Case("order_statistics", (maps, ranks, bool(rng.random() < 0.5), population))


def _cutoffs(maps, rng):
    """Return magnitudes that voxels have, so that those at the cut-off tell `>=` from `>`."""
    magnitudes = np.sort(np.abs(maps).reshape(len(maps), -1), axis=1)
    rank = int(_choice(rng, (0.0, 0.3, 0.6, 0.9, 0.99)) * (magnitudes.shape[1] - 1))
    return np.maximum(magnitudes[:, rank], np.finfo(maps.dtype).smallest_subnormal)


def _components(maps, rng, verb="components"):
    tail, connectivity = _choice(rng, TAILS), _choice(rng, CONNECTIVITIES)
    min_voxels = _choice(rng, (0, 1, 2, 3, 7, 2**40))
    return Case(verb, (maps, _cutoffs(maps, rng), tail, connectivity, min_voxels))


def _component_voxels(maps, rng):
    return _components(maps, rng, "component_voxels")


def _smooth(maps, rng):
    sigma = np.where(rng.random(3) < 0.3, 0, rng.uniform(0.1, 3, 3))
    return Case("smooth", (maps, tuple(sigma.tolist())))


def _local_maxima(maps, rng):
    share = maps.dtype.type(_choice(rng, (0, 0.1, 0.5)))
    floors = np.maximum(maps.max(axis=(1, 2, 3)) * share, 0)
    return Case("local_maxima", (maps, _choice(rng, (0, 1, 2, 3, 5, 20)), floors))


#: From maps and a generator to a random `Case` of each verb.
VERBS: dict[str, Callable] = {
    "order_statistics": _order_statistics,
    "components": _components,
    "component_voxels": _component_voxels,
    "smooth": _smooth,
    "local_maxima": _local_maxima,
}


def random_maps(kind, dtype, rng):
    """Return up to 4 volumes of up to 14 voxels along each axis."""
    shape = (rng.integers(1, 5), *rng.integers(1, 15, 3))
    return make_maps(kind, tuple(map(int, shape)), dtype, int(rng.integers(2**31)))


def spiral(side):
    """Return ``(1, 1, side, side)``: a path of ones from a corner to the middle, of odd `side`."""
    plane = np.zeros((side, side), np.float32)
    place = np.array([0, 0])
    lengths = [side - 1, *(n for n in range(side - 1, 0, -2) for _ in range(2))]
    turns = itertools.cycle([(0, 1), (1, 0), (0, -1), (-1, 0)])
    for length, step in zip(lengths, turns, strict=False):
        for _ in range(length):
            plane[tuple(place)] = 1
            place += step
    plane[tuple(place)] = 1
    return plane[np.newaxis, np.newaxis]


def snake(side):
    """Return ``(1, side, side, side)``: a path of ones through all of the volume; odd `side`."""
    volume = np.zeros((1, side, side, side), np.float32)
    volume[0, ::2, ::2] = 1  # rows of voxels along z
    volume[0, ::2, 1::4, -1] = volume[0, ::2, 3::4, 0] = 1  # joined at alternating ends
    volume[0, 1::4, -1, -1] = volume[0, 3::4, 0, 0] = 1
    return volume


def special(dtype):
    """Return cases that random ones do not meet, by name."""
    return {**_not_finite(dtype), **_paths_and_planes(dtype), **_wide_and_many(dtype)}


def _extreme_values(dtype, n_volumes):
    """Return volumes of every special value, each several times, in random order."""
    limits, integer = np.finfo(dtype), np.dtype(f"i{np.dtype(dtype).itemsize}")
    some = [np.inf, np.nan, 0, limits.max, limits.tiny, limits.smallest_subnormal, 1, 1.5]
    values = np.array(some * 2 + [-value for value in some * 2], dtype)
    other_nan = (np.array([np.inf, -np.inf], dtype).view(integer) + 1).view(dtype)
    values = np.concatenate([values, other_nan])
    rng = np.random.default_rng(0)
    return np.stack([rng.permuted(values).reshape(1, 2, -1) for _ in range(n_volumes)])


def _not_finite(dtype):
    cases = {}
    n = _extreme_values(dtype, 1).size
    maps = _extreme_values(dtype, n - 1)
    every_rank = np.arange(n)[np.newaxis]
    neighbours = np.arange(n - 1)[:, np.newaxis] + [0, 1]  # another pair in each volume
    for name, absolute in (("values", False), ("magnitudes", True)):
        values = np.abs(maps) if absolute else maps
        ordered = np.sort(values.reshape(n - 1, n), axis=1)  # NaN last, whatever its sign
        for what, ranks in ((name, every_rank), (f"neighbouring {name}", neighbours)):
            cases[f"extreme {what}"] = Case(
                "order_statistics",
                (maps[: len(ranks)], ranks, absolute, None),
                np.take_along_axis(ordered[: len(ranks)], ranks, axis=1),
            )
    maps = make_maps("smooth", (3, 7, 8, 9), dtype, 0)
    rng = np.random.default_rng(0)
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        maps[rng.random(maps.shape) < 0.1] = value
    cutoffs = np.array([0.1, 0.5, np.inf], dtype)
    for tail in TAILS:
        cases[f"missing and infinite voxels, {tail}"] = Case(
            "components", (maps, cutoffs, tail, 18, 2)
        )
    return cases


def _paths_and_planes(dtype):
    chessboard = 2 * (np.indices((6, 7, 8)).sum(axis=0)[np.newaxis] % 2) - 1
    volumes = {
        "a spiral": spiral(141),
        "a snake": snake(23),
        "nothing but foreground": np.ones((1, 9, 10, 11)),
        "two signs alternating": chessboard,
    }
    return {
        f"{name}, {connectivity}": Case(
            "component_voxels",
            (maps.astype(dtype), np.ones(1, dtype), "both", connectivity, 1),
        )
        for name, maps in volumes.items()
        for connectivity in CONNECTIVITIES
    }


def _wide_and_many(dtype):
    many, few, long = (
        make_maps("noise", shape, dtype, 0)
        for shape in ((1, 26, 26, 26), (2, 3, 4, 5), (1, 2, 3, 150))
    )
    to_the_border = _CPU.local_maxima(few, 5, np.zeros(2, dtype))
    regions = (many, np.full(1, 1.5, dtype), "both", 6, 2)
    pair, apart = np.array([[16700, 16701]]), np.array([[0, 40, 9000, 9000, 17575]])
    members = many > -1
    return {
        "neighbouring ranks of several chunks": Case("order_statistics", (many, pair, True, None)),
        "ranks of a population in several chunks": Case(
            "order_statistics", (many, apart * members.sum() // many.size, False, members)
        ),
        "more chunks than threads": Case("components", regions),
        "more chunks than threads, voxels": Case("component_voxels", regions),
        "a window wider than a warp": Case("local_maxima", (long, 40, np.zeros(1, dtype))),
        "a window wider than the volume": Case(
            "local_maxima", (few, 10**12, np.zeros(2, dtype)), to_the_border
        ),
        "a kernel wider than the volume": Case("smooth", (few, (10.0, 0.7, 30.0))),
    }


def _contended():
    large, small = (2, 17, 17, 17), (2, 7, 8, 9)
    noise = make_maps("noise", small, "float32", 0)
    ones, cutoffs = np.ones(small, np.float32), np.array([0.8, 1], np.float32)
    pairs, apart = np.array([[2400, 2401]] * 2), np.array([[100], [4800]])
    return {
        "neighbouring ranks": Case(
            "order_statistics", (make_maps("noise", large, "float32", 0), pairs, True, None)
        ),
        "ranks in float64": Case(
            "order_statistics", (make_maps("smooth", large, "float64", 0), apart, False, None)
        ),
        "one dense component": Case("components", (ones, cutoffs, "positive", 26, 1)),
        "voxels of components": Case("component_voxels", (noise, cutoffs, "both", 6, 2)),
        "maxima": Case(
            "local_maxima",
            (make_maps("plateaus", small, "float32", 0), 2, np.zeros(2, np.float32)),
        ),
        "smoothing": Case("smooth", (noise, (0.0, 1.5, 0.0))),
    }


#: Cases in which threads of several warps and of several blocks meet at the same places. Together
#: they launch every kernel, and they are small: for engines that take their time.
CONTENDED = _contended()

"""The random walker, solved exactly.

A voxel goes to the seed that a walker starting there reaches first most probably; the walker
prefers steps between similar values. The probabilities solve a sparse linear system (Grady,
"Random Walks for Image Segmentation", IEEE Transactions on Pattern Analysis and Machine
Intelligence 28(11), 2006, doi:10.1109/TPAMI.2006.233). Seeds compete only inside one connected
component, so each component is a system of its own, and one with a single seed needs none.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuroi.algorithms.dirichlet import DirichletProblem
from gpuroi.backends._runs import label_runs

#: Weight of a step is ``exp(-BETA / (10 std) * difference**2) + LEAST_WEIGHT``, as in nilearn.
BETA = 130.0
LEAST_WEIGHT = 1e-10

#: Probabilities closer than this are a tie, which the lowest label wins.
TIE = 1e-9


@dataclass(frozen=True)
class Confidence:
    """How sure labels are; the defaults are those of labels that needed no solution."""

    residual: float = 0.0  # largest imbalance of the equations
    error: float = 0.0  # estimate of the largest error of a probability
    smallest_margin: float = 1.0  # between the two most probable seeds of a voxel
    n_undecided: int = 0  # voxels whose margin is too close to TIE for `error`
    solvers: tuple[str, ...] = ()  # that factorised the equations

    @classmethod
    def lowest(cls, several: Iterable["Confidence"]) -> "Confidence":
        """Return what holds for all of `several` together."""
        result = cls()
        for one in several:
            result = cls(
                max(result.residual, one.residual),
                max(result.error, one.error),
                min(result.smallest_margin, one.smallest_margin),
                result.n_undecided + one.n_undecided,
                tuple(sorted({*result.solvers, *one.solvers})),
            )
        return result


@dataclass(frozen=True)
class Walk:
    """Labels of the foreground ``(m,)``, 0 where no seed decides, and how sure they are."""

    label: NDArray[np.int32]
    confidence: Confidence


def random_walk(
    index: NDArray[np.int64],
    values: NDArray[np.floating],
    seeds: NDArray[np.int32],
    shape: tuple[int, int, int],
) -> Walk:
    """Return the label that each foreground voxel gets from `seeds`.

    Parameters
    ----------
    index : int64 array (m,)
        Flat indices of the foreground in C order of `shape`, ascending.
    values : float array (m,)
        The map on the foreground; it is zero elsewhere.
    seeds : int32 array (m,)
        1..k on seeds, 0 on other voxels of the foreground.
    shape : tuple
        Of the volume.

    Notes
    -----
    As in nilearn, components without a seed, and those made of nothing but seeds, get no label;
    but if there is no other component at all, seeds keep their labels.
    """
    component, n_components = _components(index, shape)
    unlabelled = np.bincount(component[seeds == 0], minlength=n_components)
    seeded = np.bincount(component[seeds > 0], minlength=n_components)
    decided = (unlabelled > 0) & (seeded > 0)
    if not decided.any():
        return Walk(seeds.astype(np.int32), Confidence())

    lowest_seed = np.full(n_components, np.iinfo(np.int32).max, np.int32)
    highest_seed = np.zeros(n_components, np.int32)
    np.minimum.at(lowest_seed, component[seeds > 0], seeds[seeds > 0])
    np.maximum.at(highest_seed, component[seeds > 0], seeds[seeds > 0])
    label = np.where(decided, highest_seed, 0)[component].astype(np.int32)
    contested = np.flatnonzero(decided & (lowest_seed < highest_seed))
    if contested.size == 0:
        return Walk(label, Confidence())

    # In units of a power of two, which rounds nothing, so that squares of huge values are finite.
    unit = int(np.frexp(np.abs(values).max())[1])
    exact = np.ldexp(values.astype(np.float64), -unit)
    deviation = _standard_deviation(exact, shape)
    scale = 0.0  # a constant volume has no steps
    if deviation > 0:
        with np.errstate(over="ignore"):
            scale = min(np.ldexp(BETA / (10 * deviation), unit), np.finfo(np.float64).max)
    by_component = np.argsort(component, kind="stable")
    begins = np.searchsorted(component[by_component], contested)
    ends = np.searchsorted(component[by_component], contested, side="right")
    confidences = []
    for begin, end in zip(begins, ends, strict=True):
        voxels = by_component[begin:end]
        edges = _edges(index[voxels], shape)
        steps = np.subtract(*exact[voxels][edges])
        weights = np.exp(-scale * steps**2) + LEAST_WEIGHT
        walk = _solve(index[voxels], shape, edges, weights, seeds[voxels])
        label[voxels] = walk.label
        confidences.append(walk.confidence)
    return Walk(label, Confidence.lowest(confidences))


def _components(
    index: NDArray[np.int64], shape: tuple[int, int, int]
) -> tuple[NDArray[np.int32], int]:
    """Return a component (0..n-1) for each voxel of the foreground, and n."""
    foreground = np.zeros(shape, np.uint8)
    foreground.ravel()[index] = 1
    return label_runs(foreground, index, 6)


def _edges(index: NDArray[np.int64], shape: tuple[int, int, int]) -> NDArray[np.int64]:
    """Return all pairs ``(2, e)`` of voxels that share a face, as places in `index`."""
    _, ny, nz = shape
    pairs = []
    for stride, length in ((ny * nz, shape[0]), (nz, ny), (1, nz)):
        has_next = np.flatnonzero(index // stride % length < length - 1)
        wanted = index[has_next] + stride
        place = np.minimum(np.searchsorted(index, wanted), index.size - 1)
        found = index[place] == wanted
        pairs.append(np.stack([has_next[found], place[found]]))
    return np.concatenate(pairs, axis=1)


def _standard_deviation(values: NDArray[np.float64], shape: tuple[int, int, int]) -> float:
    """Return the standard deviation of a volume that is zero but for `values`.

    Over the foreground in C order: the same whatever the layout of the volume.
    """
    n = np.prod(shape, dtype=np.float64)
    mean = values.sum() / n
    squares = ((values - mean) ** 2).sum() + (n - values.size) * mean**2
    return float(np.sqrt(squares / n))


def _solve(
    index: NDArray[np.int64],
    shape: tuple[int, int, int],
    edges: NDArray[np.int64],
    weights: NDArray[np.float64],
    seeds: NDArray[np.int32],
) -> Walk:
    """Return the labels of one component; `edges` are places in `index` and `seeds`."""
    labels, column = np.unique(seeds[seeds > 0], return_inverse=True)
    unknown = np.flatnonzero(seeds == 0)
    place = np.full(seeds.size, -1)
    place[unknown] = np.arange(unknown.size)
    column_of = np.full(seeds.size, -1)
    column_of[seeds > 0] = column

    # An edge joins two unknowns, or an unknown and a seed; edges between seeds do not matter.
    inside = (place[edges] >= 0).all(axis=0)
    to_seeds = np.zeros((unknown.size, labels.size))
    for a, b in (edges, edges[::-1]):
        to_seed = (place[a] >= 0) & (column_of[b] >= 0)
        np.add.at(to_seeds, (place[a[to_seed]], column_of[b[to_seed]]), weights[to_seed])

    problem = DirichletProblem(
        edges=place[edges[:, inside]],
        weights=weights[inside],
        boundary_weights=to_seeds,
        coordinates=np.stack(np.unravel_index(index[unknown], shape), axis=1),
    )
    solution = problem.solve()
    probability = solution.probabilities
    two_highest = np.partition(probability, labels.size - 2, axis=1)[:, -2:]
    highest = two_highest[:, 1]
    margin = highest - two_highest[:, 0]
    winner = np.argmax(probability >= (highest - TIE)[:, np.newaxis], axis=1)
    label = seeds.astype(np.int32)
    label[unknown] = labels[winner]
    return Walk(
        label,
        Confidence(
            solution.residual,
            solution.error,
            float(margin.min()),
            int(np.count_nonzero(~(np.abs(margin - TIE) > 2 * solution.error))),
            (solution.solver,),
        ),
    )

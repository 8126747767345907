"""Harmonic functions on a weighted voxel graph, to the last digits that labels may depend on.

Weights of the random walker span ten orders of magnitude, and a cluster of voxels that hangs on
the rest by its weakest edges makes the equations as badly conditioned as that: conjugate gradients
and multigrid stall, and a direct solution in float64 is wrong in the sixth digit, or in the first.
It is therefore refined: residuals are computed edge by edge in extended precision, from
differences, where nothing cancels, until corrections are far below the margins between labels.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gpuroi.algorithms.checkerboard import (
    HAS_CHOLMOD,
    Checkerboard,
    CholmodFactors,
    Factors,
    superlu,
)
from gpuroi.algorithms.multifrontal import MultifrontalCholesky

# Corrections of probabilities that no longer matter. Maps need one or two refinements; a plateau
# that hangs on its seeds by the weakest edges alone gains a digit with each.
_ACCURATE = 1e-10
_MOST_REFINEMENTS = 20

# Where CHOLMOD is not installed. Measured on statistical maps: SuperLU wins on thin structures,
# nested dissection on compact ones, which have more neighbours, and on all large ones.
_LARGE = 100_000
_COMPACT_MEAN_DEGREE = 5.5
_LEAST_COMPACT = 15_000


@dataclass(frozen=True)
class Solution:
    """Probabilities ``(n, k)``, and how far off they may be."""

    probabilities: NDArray[np.float64]
    residual: float  # largest imbalance of an equation
    error: float  # largest sum of an unknown's last corrections
    solver: str  # "cholmod", "multifrontal" or "superlu"


@dataclass(frozen=True)
class DirichletProblem:
    """Find x with ``sum_j w_ij (x_i - x_j) + sum_l b_il (x_i - [column is l]) = 0`` for all i.

    Parameters
    ----------
    edges : int64 array (2, e)
        Pairs of unknowns.
    weights : float64 array (e,)
        Positive.
    boundary_weights : float64 array (n, k)
        Sum of the weights of each unknown's edges to the seeds of each label. Every unknown is
        connected to some seed.
    coordinates : int64 array (n, 3)
        The voxel of each unknown.
    """

    edges: NDArray[np.int64]
    weights: NDArray[np.float64]
    boundary_weights: NDArray[np.float64]
    coordinates: NDArray[np.int64]

    def solve(self) -> Solution:
        """Return the probabilities of all labels; those of the last are one minus the others."""
        factorisation, solver = self._factorise()
        x = factorisation.solve(np.asfortranarray(self.boundary_weights[:, :-1]))
        residual, error = 0.0, 1.0  # no probability is further off
        for _ in range(_MOST_REFINEMENTS):
            lacking = self._residual(x)
            residual = float(np.abs(lacking).max(initial=0))
            correction = factorisation.solve(lacking)
            # Of all labels together, which is what the last one can be off by.
            size = float(np.abs(correction).sum(axis=1).max(initial=0))
            if not size < error:  # rounding is all that is left, or it was too much to begin with
                break
            x, error = x + correction, size
            if error <= _ACCURATE:
                break
        return Solution(np.column_stack([x, 1 - x.sum(axis=1)]), residual, error, solver)

    def _factorise(self) -> tuple[Factors, str]:
        n = len(self.boundary_weights)
        first, second = self.edges
        degree = self.boundary_weights.sum(axis=1)
        degree += np.bincount(first, self.weights, n) + np.bincount(second, self.weights, n)
        compact = n >= _LEAST_COMPACT and 2 * self.weights.size >= _COMPACT_MEAN_DEGREE * n
        grid = self.edges, self.weights, degree, self.coordinates
        try:
            if HAS_CHOLMOD:
                return Checkerboard(*grid, CholmodFactors), "cholmod"
            if n >= _LARGE or compact:
                return MultifrontalCholesky(*grid), "multifrontal"
        except np.linalg.LinAlgError:
            pass  # A seed too weakly tied for float64: factors without square roots still exist.
        return Checkerboard(*grid, superlu), "superlu"

    @cached_property
    def _flows(self) -> "_Flows":
        return _Flows.between(self.edges, self.weights, self.boundary_weights)

    def _residual(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what each equation lacks, in float64, from sums in extended precision."""
        flows = self._flows
        residual = np.empty_like(x)
        for label in range(x.shape[1]):
            value = x[:, label].astype(np.longdouble)
            balance = flows.from_seeds[:, label] - flows.to_seeds * value
            flow = flows.weights * (value[flows.neighbour] - value[flows.unknown])
            balance[flows.coupled] += np.add.reduceat(flow, flows.starts)
            residual[:, label] = balance
        return residual


@dataclass(frozen=True)
class _Flows:
    """Every edge seen from both its ends, ordered by unknown, in extended precision."""

    unknown: NDArray[np.int64]
    neighbour: NDArray[np.int64]
    weights: NDArray[np.longdouble]
    coupled: NDArray[np.int64]  # unknowns with a neighbour
    starts: NDArray[np.int64]  # of each of these among the edges
    from_seeds: NDArray[np.longdouble]
    to_seeds: NDArray[np.longdouble]

    @classmethod
    def between(
        cls,
        edges: NDArray[np.int64],
        weights: NDArray[np.float64],
        boundary_weights: NDArray[np.float64],
    ) -> "_Flows":
        """Return the edges of a `DirichletProblem`."""
        both_ways = np.concatenate([edges, edges[::-1]], axis=1)
        order = np.argsort(both_ways[0], kind="stable")
        unknown, neighbour = both_ways[:, order]
        starts = np.flatnonzero(np.diff(unknown, prepend=-1))
        coupled = unknown[starts]
        from_seeds = boundary_weights.astype(np.longdouble)
        extended = np.concatenate([weights, weights])[order].astype(np.longdouble)
        return cls(
            unknown, neighbour, extended, coupled, starts, from_seeds, from_seeds.sum(axis=1)
        )

"""Harmonic functions on a weighted voxel graph, to the last digits that labels may depend on.

Weights of the random walker span ten orders of magnitude, and a cluster of voxels that hangs on
the rest by its weakest edges makes the equations as badly conditioned as that: conjugate gradients
and multigrid stall, and a direct solution in float64 is wrong in the sixth digit. It is therefore
refined: residuals are computed edge by edge in extended precision, from differences, where nothing
cancels, and two corrections take the error far below the margins between labels.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_array, csr_array
from scipy.sparse.linalg import splu

from gpuroi.algorithms.multifrontal import MultifrontalCholesky

_REFINEMENTS = 2

# Measured on statistical maps: SuperLU's minimum degree ordering wins on thin structures, nested
# dissection on compact ones, which have more neighbours, and on all large ones.
_LARGE = 100_000
_COMPACT_MEAN_DEGREE = 5.5
_LEAST_COMPACT = 15_000


class _Factorisation(Protocol):
    def solve(self, right_sides: NDArray[np.float64]) -> NDArray[np.float64]: ...


@dataclass(frozen=True)
class Solution:
    """Probabilities ``(n, k)``, and how far off they may be."""

    probabilities: NDArray[np.float64]
    residual: float  # largest imbalance of an equation
    error: float  # size of the last correction


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
        factorisation = self._factorise()
        x = factorisation.solve(np.asfortranarray(self.boundary_weights[:, :-1]))
        correction = x
        for _ in range(_REFINEMENTS):
            correction = factorisation.solve(self._residual(x))
            x = x + correction
        probabilities = np.column_stack([x, 1 - x.sum(axis=1)])
        residual = np.abs(self._residual(x)).max(initial=0)
        return Solution(probabilities, float(residual), float(np.abs(correction).max(initial=0)))

    @cached_property
    def _graph(self) -> csr_array:
        """Weights as a symmetric matrix."""
        n = len(self.boundary_weights)
        first, second = self.edges
        ends = (np.concatenate([first, second]), np.concatenate([second, first]))
        return csr_array((np.concatenate([self.weights] * 2), ends), shape=(n, n))

    def _factorise(self) -> _Factorisation:
        graph = self._graph
        n = graph.shape[0]
        degree = graph.sum(axis=1) + self.boundary_weights.sum(axis=1)
        matrix = csc_array(-graph)
        matrix.setdiag(degree)
        compact = n >= _LEAST_COMPACT and graph.nnz >= _COMPACT_MEAN_DEGREE * n
        if n >= _LARGE or compact:
            return MultifrontalCholesky(matrix, self.coordinates)
        factorisation: _Factorisation = splu(
            matrix,
            permc_spec="MMD_AT_PLUS_A",
            diag_pivot_thresh=0.0,
            options={"SymmetricMode": True},
        )
        return factorisation

    def _residual(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what each equation lacks, in float64, from sums in extended precision."""
        graph = self._graph
        row = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))
        has_neighbour = np.flatnonzero(np.diff(graph.indptr))
        weights = graph.data.astype(np.longdouble)
        boundary = self.boundary_weights.astype(np.longdouble)
        to_all_seeds = boundary.sum(axis=1)
        residual = np.empty_like(x)
        for label in range(x.shape[1]):
            value = x[:, label].astype(np.longdouble)
            balance = boundary[:, label] - to_all_seeds * value
            flow = weights * (value[graph.indices] - value[row])
            balance[has_neighbour] += np.add.reduceat(flow, graph.indptr[has_neighbour])
            residual[:, label] = balance
        return residual

"""Sparse factorisation of systems on a voxel grid, after every second voxel is eliminated.

The graph of face neighbours is bipartite, like the squares of a checkerboard: half of the unknowns
are coupled to the other half only, and can be eliminated all at once. What is left has half as many
unknowns, for a library with a minimum-degree ordering: CHOLMOD where cvxopt is installed, else
SciPy's SuperLU.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_array, csr_array, diags_array, tril
from scipy.sparse.linalg import splu

try:
    from cvxopt import cholmod, matrix, spmatrix
except ImportError:
    cholmod = None
HAS_CHOLMOD = cholmod is not None


class Factors(Protocol):
    """A matrix that has been factorised."""

    def solve(self, right_sides: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the solutions ``(n, k)`` for `right_sides` ``(n, k)``."""


def superlu(symmetric: csc_array) -> Factors:
    """Return the LU factors of a matrix with a dominant diagonal."""
    # Small panels: the factors of surfaces and thin bridges have few equal columns.
    factors: Factors = splu(
        symmetric,
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        relax=1,
        panel_size=4,
        options={"SymmetricMode": True},
    )
    return factors


class CholmodFactors:
    """Supernodal Cholesky factors by CHOLMOD, of SuiteSparse, through cvxopt.

    (Chen, Davis, Hager and Rajamanickam, ACM Transactions on Mathematical Software 35(3), 2008,
    doi:10.1145/1391989.1391995.)
    """

    def __init__(self, symmetric: csc_array) -> None:
        lower = tril(symmetric, format="coo")
        entries = (lower.data, lower.row.astype(np.int64), lower.col.astype(np.int64))
        lower = spmatrix(*map(matrix, entries), symmetric.shape)
        self._factors = cholmod.symbolic(lower)
        try:
            cholmod.numeric(lower, self._factors)
        except ArithmeticError as error:
            raise np.linalg.LinAlgError("the matrix is not positive definite") from error

    def solve(self, right_sides: NDArray[np.float64]) -> NDArray[np.float64]:
        """See `Factors.solve`."""
        solutions = matrix(right_sides)
        cholmod.solve(self._factors, solutions)
        return np.array(solutions)


class Checkerboard:
    """Factorisation of ``diag(degree) - weights``, symmetric, on a 6-connected grid.

    Parameters
    ----------
    edges : int64 array (2, e)
        Pairs of unknowns whose voxels share a face.
    weights : float64 array (e,)
        Minus the entries off the diagonal.
    degree : float64 array (n,)
        The diagonal.
    coordinates : integer array (n, 3)
        The voxel of each unknown.
    factorise : callable
        `superlu` or `CholmodFactors`, for the unknowns that are left.

    Raises
    ------
    LinAlgError
        If `factorise` is a Cholesky factorisation and rounding has made the matrix indefinite.
    """

    def __init__(
        self,
        edges: NDArray[np.int64],
        weights: NDArray[np.float64],
        degree: NDArray[np.float64],
        coordinates: NDArray[np.int64],
        factorise: Callable[[csc_array], Factors],
    ) -> None:
        is_black = coordinates.sum(axis=1) % 2 == 1
        self._black, self._white = np.flatnonzero(is_black), np.flatnonzero(~is_black)
        place = np.empty(degree.size, np.int64)
        place[self._black] = np.arange(self._black.size)
        place[self._white] = np.arange(self._white.size)
        first, second = edges
        ends = np.where(is_black[first], first, second), np.where(is_black[first], second, first)
        self._across = csr_array(
            (weights, (place[ends[0]], place[ends[1]])),
            shape=(self._black.size, self._white.size),
        )
        self._white_degree = degree[self._white][:, np.newaxis]
        through_white = self._across @ diags_array(1 / degree[self._white]) @ self._across.T
        reduced = (diags_array(degree[self._black]) - through_white).tocsc()
        self._factors = factorise(reduced) if self._black.size else None

    def solve(self, right_sides: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the solutions ``(n, k)`` for `right_sides` ``(n, k)``."""
        x = np.empty_like(right_sides)
        white = right_sides[self._white] / self._white_degree
        if self._factors is not None:
            black = self._factors.solve(right_sides[self._black] + self._across @ white)
            white += (self._across.T @ black) / self._white_degree
            x[self._black] = black
        x[self._white] = white
        return x

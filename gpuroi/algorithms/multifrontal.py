"""Sparse Cholesky factorisation of large systems on a voxel grid.

Nested dissection cuts the grid by planes; voxels are eliminated cut by cut from the inside out, and
what an elimination leaves behind is a dense matrix on the voxels around it. So nearly all the work
is dense Cholesky, at the speed of BLAS, which is what a general sparse solver with a minimum-degree
ordering loses on compact three-dimensional regions.

George, "Nested dissection of a regular finite element mesh", SIAM Journal on Numerical Analysis
10(2), 1973. Duff and Reid, "The multifrontal solution of indefinite sparse symmetric linear
equations", ACM Transactions on Mathematical Software 9(3), 1983.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas, lapack
from scipy.sparse import csc_array

from gpuroi.algorithms._blas import one_blas_thread

# Below this a part is eliminated as one dense block; smaller leaves cost more in overhead.
_LEAF_VOXELS = 200

# A cut may leave at most this share of a part on one side.
_MOST_ON_ONE_SIDE = 0.7


class _Part(NamedTuple):
    """Unknowns eliminated together, and the earlier parts whose remainders meet in them."""

    unknowns: NDArray[np.int64]
    inner: tuple[int, ...]


@dataclass(frozen=True)
class _Block:
    """Columns ``begin:end`` of the factor: the dense triangle, and the rows below it."""

    begin: int
    end: int
    rows: NDArray[np.int64]
    triangle: NDArray[np.float64]
    below: NDArray[np.float64]


class _Remainder(NamedTuple):
    """What an elimination leaves: a dense matrix on the rows around it."""

    rows: NDArray[np.int64]
    matrix: NDArray[np.float64]


class MultifrontalCholesky:
    """Factorisation of ``diag(degree) - weights``, positive definite, on a 6-connected grid.

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
    """

    def __init__(
        self,
        edges: NDArray[np.int64],
        weights: NDArray[np.float64],
        degree: NDArray[np.float64],
        coordinates: NDArray[np.int64],
    ) -> None:
        # Threads that wait for one another in small blocks cost more than they save.
        with one_blas_thread():
            self._factorise(edges, weights, degree, coordinates)

    def _factorise(
        self,
        edges: NDArray[np.int64],
        weights: NDArray[np.float64],
        degree: NDArray[np.float64],
        coordinates: NDArray[np.int64],
    ) -> None:
        parts = _Dissection(coordinates).parts
        self._order = np.concatenate([part.unknowns for part in parts])
        place = np.empty(self._order.size, np.int64)
        place[self._order] = np.arange(self._order.size)
        row, column = np.sort(place[edges], axis=0)[::-1]  # the lower triangle
        lower = csc_array((-weights, (row, column)), shape=(degree.size,) * 2)
        lower.sort_indices()
        diagonal = degree[self._order]

        self._blocks: list[_Block] = []
        remainders: dict[int, _Remainder] = {}
        begin = 0
        for number, part in enumerate(parts):
            end = begin + part.unknowns.size
            inner = [remainders.pop(child) for child in part.inner]
            block, remainders[number] = _eliminate(lower, diagonal, begin, end, inner)
            if block is not None:
                self._blocks.append(block)
            begin = end

    def solve(self, right_sides: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the solutions ``(n, k)`` for `right_sides` ``(n, k)``."""
        with one_blas_thread():
            return self._solve(right_sides)

    def _solve(self, right_sides: NDArray[np.float64]) -> NDArray[np.float64]:
        x: NDArray[np.float64] = right_sides[self._order]
        for block in self._blocks:
            own = blas.dtrsm(1.0, block.triangle, x[block.begin : block.end], lower=1)
            x[block.begin : block.end] = own
            x[block.rows] -= block.below @ own
        for block in reversed(self._blocks):
            own = x[block.begin : block.end] - block.below.T @ x[block.rows]
            x[block.begin : block.end] = blas.dtrsm(1.0, block.triangle, own, lower=1, trans_a=1)
        solutions = np.empty_like(x)
        solutions[self._order] = x
        return solutions


class _Dissection:
    """Nested dissection by planes: `parts` in the order of elimination, inner before outer.

    A plane is cut by those of its voxels alone that have a neighbour on its other side.
    """

    def __init__(self, coordinates: NDArray[np.int64]) -> None:
        self.parts: list[_Part] = []
        self._coordinates = coordinates - coordinates.min(axis=0, initial=np.iinfo(np.int64).max)
        self._ahead = _next_along_axes(self._coordinates)
        self._part_of = np.full(len(coordinates) + 1, -1)  # the last one is nobody's
        self._visit(np.arange(len(coordinates)), depth=0)

    def _visit(self, unknowns: NDArray[np.int64], depth: int) -> int:
        """Append the parts of `unknowns`; return the last one's place in `parts`."""
        inner: list[int] = []
        if unknowns.size > _LEAF_VOXELS:
            # Sets of one depth never touch: the depth tells neighbours in this set from all others.
            self._part_of[unknowns] = depth
            lower, cut, upper = self._cut(unknowns, depth)
            if cut.size < unknowns.size:
                sides = [side for side in (lower, upper) if side.size]
                inner = [self._visit(side, depth + 1) for side in sides]
                unknowns = cut
        self.parts.append(_Part(unknowns, tuple(inner)))
        return len(self.parts) - 1

    def _cut(
        self, unknowns: NDArray[np.int64], depth: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the unknowns below, on and above the smallest cut into sides of similar size."""
        n = unknowns.size
        best_cost, best = np.inf, (unknowns[:0], unknowns, unknowns[:0])
        for axis in range(3):
            plane = self._coordinates[unknowns, axis]
            plane -= plane.min()
            crosses = self._part_of[self._ahead[axis, unknowns]] == depth
            in_plane = np.bincount(plane)[:-1]
            if in_plane.size == 0:
                continue
            on_cut = np.bincount(plane[crosses], minlength=in_plane.size)
            below = np.cumsum(in_plane) - on_cut
            larger_side = np.maximum(below, n - below - on_cut)
            # Balance comes first; among balanced cuts the smallest leaves the smallest remainder.
            cost = np.where(larger_side > _MOST_ON_ONE_SIDE * n, n + larger_side, on_cut)
            position = int(np.argmin(cost))
            if cost[position] < best_cost:
                is_cut = (plane == position) & crosses
                sides = (plane <= position) & ~is_cut, is_cut, plane > position
                best_cost = cost[position]
                best = unknowns[sides[0]], unknowns[sides[1]], unknowns[sides[2]]
        return best


def _next_along_axes(coordinates: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each axis ``(3, n)`` the unknown one voxel ahead, or n where there is none."""
    n = len(coordinates)
    shape = coordinates.max(axis=0, initial=0) + 2
    unknown_at = np.full(shape, n)
    unknown_at[tuple(coordinates.T)] = np.arange(n)
    return np.stack([unknown_at[tuple((coordinates + step).T)] for step in np.eye(3, dtype=int)])


def _eliminate(
    lower: csc_array,
    diagonal: NDArray[np.float64],
    begin: int,
    end: int,
    inner: list[_Remainder],
) -> tuple[_Block | None, _Remainder]:
    """Eliminate columns ``begin:end`` of a matrix given by its lower triangle and its diagonal.

    Only the lower triangles of dense matrices are meaningful.
    """
    n_own = end - begin
    entries = slice(lower.indptr[begin], lower.indptr[end])
    row, value = lower.indices[entries], lower.data[entries]
    column = np.repeat(np.arange(n_own), np.diff(lower.indptr[begin : end + 1]))
    around = [row, *(remainder.rows for remainder in inner)]
    rows = np.unique(np.concatenate([part[part >= end] for part in around]))

    def place(unknowns: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.where(unknowns < end, unknowns - begin, n_own + np.searchsorted(rows, unknowns))

    front = np.zeros((n_own + rows.size,) * 2, order="F")
    front[place(row), column] = value
    front[np.arange(n_own), np.arange(n_own)] = diagonal[begin:end]
    for remainder in inner:
        if remainder.rows.size == 0:
            continue
        _add(front, place(remainder.rows), remainder.matrix)
    if n_own == 0:  # the cut between parts that do not touch
        return None, _Remainder(rows, front)

    triangle, failed = lapack.dpotrf(front[:n_own, :n_own], lower=1, clean=1)
    if failed:
        raise np.linalg.LinAlgError("the matrix is not positive definite")
    below, rest = np.zeros((0, n_own)), front[n_own:, n_own:]
    if rows.size:
        below = blas.dtrsm(1.0, triangle, front[n_own:, :n_own], side=1, lower=1, trans_a=1)
        rest = blas.dsyrk(-1.0, below, beta=1.0, c=rest, lower=1)
    return _Block(begin, end, rows, triangle, below), _Remainder(rows, rest)


def _add(
    front: NDArray[np.float64], places: NDArray[np.int64], remainder: NDArray[np.float64]
) -> None:
    """Add the lower triangle of `remainder` to the ascending `places` of `front`.

    Places come in stretches, because neighbours are eliminated together: each stretch of rows goes
    at once, which NumPy copies row by row and not entry by entry.
    """
    starts = np.concatenate([[0], np.flatnonzero(np.diff(places) != 1) + 1])
    stops = np.append(starts[1:], places.size)
    columns, addend = front.T, remainder.T  # rows of these are contiguous
    for row, start, stop in zip(
        places[starts].tolist(), starts.tolist(), stops.tolist(), strict=True
    ):
        columns[places[:stop], row : row + stop - start] += addend[:stop, start:stop]

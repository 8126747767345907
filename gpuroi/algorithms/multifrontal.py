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


class MultifrontalCholesky:
    """Factorisation of a symmetric positive definite matrix whose graph is a 6-connected grid.

    Parameters
    ----------
    matrix : sparse array (n, n) float64
        Non-zero only between voxels that share a face.
    coordinates : integer array (n, 3)
        The voxel of each unknown.
    """

    def __init__(self, matrix: csc_array, coordinates: NDArray[np.int64]) -> None:
        parts = _dissect(coordinates)
        self._order = np.concatenate([part.unknowns for part in parts])
        ordered = matrix[self._order][:, self._order].tocsc()
        ordered.sort_indices()
        self._blocks: list[_Block] = []
        remainders: dict[int, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}
        begin = 0
        for number, part in enumerate(parts):
            end = begin + part.unknowns.size
            inner = [remainders.pop(child) for child in part.inner]
            block, remainder = _eliminate(ordered, begin, end, inner)
            self._blocks.append(block)
            remainders[number] = (block.rows, remainder)
            begin = end

    def solve(self, right_sides: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the solutions ``(n, k)`` for `right_sides` ``(n, k)``."""
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


def _dissect(coordinates: NDArray[np.int64]) -> list[_Part]:
    """Return the parts of nested dissection in the order of elimination, inner before outer."""
    parts: list[_Part] = []

    def visit(unknowns: NDArray[np.int64]) -> int:
        inner: list[int] = []
        cut = None
        if unknowns.size > _LEAF_VOXELS:
            cut = _best_cut(coordinates[unknowns])
        if cut is not None:
            axis, plane = cut
            position = coordinates[unknowns, axis]
            for side in (position < plane, position > plane):
                if side.any():
                    inner.append(visit(unknowns[side]))
            unknowns = unknowns[position == plane]
        parts.append(_Part(unknowns, tuple(inner)))
        return len(parts) - 1

    visit(np.arange(len(coordinates)))
    return parts


def _best_cut(coordinates: NDArray[np.int64]) -> tuple[int, int] | None:
    """Return axis and position of the emptiest plane that leaves two sides of similar size."""
    n = len(coordinates)
    best: tuple[float, int, int] | None = None
    for axis in range(3):
        first = int(coordinates[:, axis].min())
        in_plane = np.bincount(coordinates[:, axis] - first)
        if in_plane.size < 3:
            continue
        before = np.cumsum(in_plane) - in_plane
        larger_side = np.maximum(before, n - before - in_plane)
        # Balance comes first; among balanced planes the emptiest leaves the smallest remainder.
        cost = np.where(larger_side > _MOST_ON_ONE_SIDE * n, n + larger_side, in_plane)
        plane = int(np.argmin(cost))
        if best is None or cost[plane] < best[0]:
            best = (float(cost[plane]), axis, first + plane)
    return None if best is None else best[1:]


def _eliminate(
    matrix: csc_array,
    begin: int,
    end: int,
    inner: list[tuple[NDArray[np.int64], NDArray[np.float64]]],
) -> tuple[_Block, NDArray[np.float64]]:
    """Eliminate columns ``begin:end``; return them, and the dense matrix left on their rows.

    Only the lower triangles of dense matrices are meaningful.
    """
    n_own = end - begin
    entries = slice(matrix.indptr[begin], matrix.indptr[end])
    row = matrix.indices[entries]
    column = np.repeat(np.arange(n_own), np.diff(matrix.indptr[begin : end + 1]))
    lower = row >= begin  # rows before are eliminated already
    row, column, value = row[lower], column[lower], matrix.data[entries][lower]
    around = [row, *(rows for rows, _ in inner)]
    rows = np.unique(np.concatenate([part[part >= end] for part in around]))

    def place(unknowns: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.where(unknowns < end, unknowns - begin, n_own + np.searchsorted(rows, unknowns))

    front = np.zeros((n_own + rows.size,) * 2, order="F")
    front[place(row), column] = value
    for inner_rows, remainder in inner:
        _add(front, place(inner_rows), remainder)

    triangle, failed = lapack.dpotrf(front[:n_own, :n_own], lower=1, clean=1)
    if failed:
        raise np.linalg.LinAlgError("the matrix is not positive definite")
    if rows.size == 0:
        return _Block(begin, end, rows, triangle, np.zeros((0, n_own))), front[n_own:, n_own:]
    below = blas.dtrsm(1.0, triangle, front[n_own:, :n_own], side=1, lower=1, trans_a=1)
    remainder = blas.dsyrk(-1.0, below, beta=1.0, c=front[n_own:, n_own:], lower=1)
    return _Block(begin, end, rows, triangle, below), remainder


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

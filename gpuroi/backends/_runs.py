"""Connected components on runs: maximal stretches of foreground along the last axis.

A thresholded map is a few percent of its volume and its runs a third of that, so a graph with a
node a run is far smaller than the volume that a dense labelling has to walk through.
(The idea is that of run-based two-pass labelling: He, Chao and Suzuki, IEEE Transactions on Image
Processing 17(5), 2008, doi:10.1109/TIP.2008.919369; here the merging is left to SciPy's csgraph.)
"""

import numpy as np
import scipy  # which loads its parts when they are first used
from numpy.typing import NDArray

from gpuroi.types import Connectivity

# Columns that precede a column in C order: dx, dy, and the reach along z at 6, 18 and 26.
# A column beside shares faces, and touches diagonally from 18 on; one across an edge is a
# neighbour from 18 on, and touches diagonally (by corners) at 26.
_BESIDE = ((0, -1), (-1, 0))
_ACROSS = ((-1, -1), (-1, 1))
_COLUMNS: dict[Connectivity, NDArray[np.int64]] = {
    6: np.array([(*column, 0) for column in _BESIDE]),
    18: np.array([(*column, 1) for column in _BESIDE] + [(*column, 0) for column in _ACROSS]),
    26: np.array([(*column, 1) for column in _BESIDE + _ACROSS]),
}


def label_runs(
    signs: NDArray[np.uint8], foreground: NDArray[np.int64], connectivity: Connectivity
) -> tuple[NDArray[np.int32], int]:
    """Return a component (0..n-1) for each voxel of the foreground, and n.

    `signs` ``(X, Y, Z)`` holds 0 for background; components join equal values only. `foreground`
    holds the flat indices of the others, ascending.
    """
    if foreground.size == 0:
        return np.zeros(0, np.int32), 0
    ny, nz = signs.shape[1:]
    values = signs.ravel()[foreground]
    begins = np.empty(foreground.size, bool)
    begins[0] = True
    np.not_equal(foreground[1:], foreground[:-1] + 1, out=begins[1:])
    begins[1:] |= values[1:] != values[:-1]
    begins |= foreground % nz == 0
    first = np.flatnonzero(begins)
    lengths = np.diff(first, append=foreground.size)

    # Rows are runs, columns of these arrays are the preceding neighbour columns.
    dx, dy, reach = _COLUMNS[connectivity].T
    start = foreground[first, np.newaxis]
    stop = start + lengths[:, np.newaxis]
    column = start // nz
    shift = (dx * ny + dy) * nz
    low = np.maximum(start - reach, column * nz) + shift
    high = np.minimum(stop + reach, (column + 1) * nz) + shift
    y = column % ny + dy

    # Runs are disjoint and sorted, so those that overlap [low, high) are consecutive.
    begin = np.searchsorted(stop.ravel(), low, side="right")
    count = np.searchsorted(start.ravel(), high, side="left") - begin
    count[(count < 0) | (y < 0) | (y >= ny)] = 0
    before = np.zeros(count.size + 1, np.int64)
    np.cumsum(count, out=before[1:])
    neighbour = np.arange(before[-1]) + np.repeat(begin.ravel() - before[:-1], count.ravel())
    row_ends = before[:: dx.size].copy()

    sign = values[first]
    if sign.min() != sign.max():
        same_sign = sign[neighbour] == np.repeat(sign, np.diff(row_ends))
        row_ends = np.concatenate([[0], np.cumsum(same_sign)])[row_ends]
        neighbour = neighbour[same_sign]
    links = (np.ones(neighbour.size), neighbour, row_ends)
    graph = scipy.sparse.csr_array(links, shape=(sign.size,) * 2)
    n_components, component = scipy.sparse.csgraph.connected_components(graph, directed=False)
    return np.repeat(component, lengths), n_components

"""Connected components on runs: maximal stretches of foreground along the last axis.

A thresholded map is a few percent of its volume and its runs a third of that, so a graph with a
node a run is far smaller than the volume that a dense labelling has to walk through.
(The idea is that of run-based two-pass labelling: He, Chao and Suzuki, IEEE Transactions on Image
Processing 17(5), 2008, doi:10.1109/TIP.2008.919369; here the merging is left to SciPy's csgraph.)
"""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from gpuroi.types import Connectivity

# Columns that precede a column in C order: (dx, dy, faces, reach along z by connectivity).
# A column that shares a face touches diagonally from 18 on; one that shares an edge is itself
# an edge neighbour at 18 and touches diagonally (a corner) at 26.
_REACH: dict[Connectivity, tuple[tuple[int, int, int], ...]] = {
    6: ((0, -1, 0), (-1, 0, 0)),
    18: ((0, -1, 1), (-1, 0, 1), (-1, -1, 0), (-1, 1, 0)),
    26: ((0, -1, 1), (-1, 0, 1), (-1, -1, 1), (-1, 1, 1)),
}


def label_runs(
    signs: NDArray[np.int8], connectivity: Connectivity
) -> tuple[NDArray[np.int64], NDArray[np.int32], int]:
    """Return the foreground's flat indices, a component (0..n-1) for each, and n.

    `signs` ``(X, Y, Z)`` holds 0 for background; components join equal non-zero values only.
    """
    ny, nz = signs.shape[1:]
    flat = signs.ravel()
    foreground = np.flatnonzero(flat)
    if foreground.size == 0:
        return foreground, np.zeros(0, np.int32), 0

    values = flat[foreground]
    begins = np.empty(foreground.size, bool)
    begins[0] = True
    np.not_equal(np.diff(foreground), 1, out=begins[1:])
    begins[1:] |= values[1:] != values[:-1]
    begins |= foreground % nz == 0
    first = np.flatnonzero(begins)
    lengths = np.diff(first, append=foreground.size)
    start = foreground[first]
    stop = start + lengths
    sign = values[first]
    column = start // nz
    y = column % ny

    pairs = []
    for dx, dy, reach in _REACH[connectivity]:
        # Runs are disjoint and sorted, so the runs that overlap [low, high) are consecutive.
        shift = (dx * ny + dy) * nz
        low = np.maximum(start - reach, column * nz) + shift
        high = np.minimum(stop + reach, (column + 1) * nz) + shift
        begin = np.searchsorted(stop, low, side="right")
        count = np.searchsorted(start, high, side="left") - begin
        count[(y + dy < 0) | (y + dy >= ny)] = 0
        np.maximum(count, 0, out=count)
        run = np.repeat(np.arange(start.size), count)
        neighbour = np.arange(run.size) + np.repeat(begin - (np.cumsum(count) - count), count)
        same_sign = sign[run] == sign[neighbour]
        pairs.append((run[same_sign], neighbour[same_sign]))

    rows, columns = (np.concatenate(ends) for ends in zip(*pairs, strict=True))
    graph = csr_array((np.ones(rows.size, bool), (rows, columns)), shape=(start.size, start.size))
    n_components, component = connected_components(graph, directed=False)
    return foreground, np.repeat(component, lengths), n_components

"""Where to cut: planes that show the signal."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from gpuroi.plotting._planes import DIRECTIONS, Direction, Volume

# Regions to look for one by one; of more, the largest.
_MOST_SOUGHT = 200


def cut_through_signal(signal: Volume) -> tuple[float, float, float]:
    """Return the mm of the voxel of largest magnitude; of the centre of the volume if all are zero.

    Of several, as in a map that was clipped: those in the component of most signal, and of them the
    one nearest to their middle.
    """
    magnitude = np.abs(signal.data)
    highest = magnitude.max(initial=0)
    if highest == 0:
        place = (np.array(magnitude.shape) - 1) // 2
    else:
        peaks = np.argwhere(magnitude == highest)
        if len(peaks) > 1:
            component, _ = ndimage.label(magnitude > 0)
            own = component[tuple(peaks.T)]
            strength = np.bincount(component.ravel(), magnitude.ravel())
            peaks = peaks[own == own[strength[own].argmax()]]
        place = peaks[((peaks - peaks.mean(axis=0)) ** 2).sum(axis=1).argmin()]
    x, y, z = (signal.affine @ [*place, 1.0])[:3].tolist()
    return x, y, z


def cuts_along(signal: Volume, direction: Direction, n_cuts: int) -> list[float]:
    """Return at most `n_cuts` mm along `direction`, ascending, denser where there is more signal.

    Every cut stands for the same share of the sum of magnitudes, so that none is spent on empty
    planes; two are never the same plane. Of labels it stands for the same share of the voxels, but
    where a cut moves so that more regions are seen.
    """
    axis = DIRECTIONS.index(direction)
    nonzero = np.stack(np.nonzero(signal.data))
    if nonzero.size == 0:
        low, high = signal.bounds_mm[axis]
        return _spread(low, high, n_cuts)
    places = signal.affine[axis, :3] @ nonzero + signal.affine[axis, 3]
    step = np.abs(signal.affine[axis, :3]).max()
    plane = np.rint((places - places.min()) / step).astype(int)
    values = signal.data[tuple(nonzero)]
    weights = np.ones(values.size) if signal.is_labels else np.abs(values).astype(np.float64)
    strength: NDArray[np.float64] = np.bincount(plane, weights).astype(np.float64)
    if np.count_nonzero(strength) <= n_cuts:
        chosen = np.flatnonzero(strength)
    else:
        chosen = _quantiles(strength, n_cuts)
        if signal.is_labels:
            chosen = _moved(chosen, *_seen(plane, values))
    return [float(mm) for mm in np.round(places.min() + chosen * step, 6)]


def _seen(plane: NDArray[Any], labels: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return which regions (planes, n) a plane shows well, and their sizes ``(n,)`` in voxels.

    Well is a quarter as large as in their best plane, or more. `plane` and `labels` are those of
    the voxels in regions.
    """
    found, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.argsort(-sizes, kind="stable")
    n = min(found.size, _MOST_SOUGHT)
    rank = np.empty(found.size, np.int64)
    rank[order] = np.arange(found.size)
    column = rank[inverse]
    is_sought = column < n
    areas = np.bincount((plane * n + column)[is_sought], minlength=(plane.max() + 1) * n)
    areas = areas.reshape(-1, n)
    return 4 * areas >= areas.max(axis=0), sizes[order[:n]]


def _moved(chosen: NDArray[Any], seen: NDArray[np.bool_], sizes: NDArray[np.int64]) -> NDArray[Any]:
    """Return the `chosen` planes, ascending, some moved so that more regions are `seen`.

    Each time it is the plane that gains the largest regions, and of several the one that moves
    least. None is gained by losing larger ones.
    """
    chosen = chosen.copy()
    planes = np.arange(len(seen))
    while True:
        total = int(seen[chosen].any(axis=0) @ sizes)
        best = (total, 0, 0, 0)  # voxels of seen regions, minus planes moved by, which, where to
        for i, plane in enumerate(chosen.tolist()):
            totals = (seen | seen[np.delete(chosen, i)].any(axis=0)) @ sizes
            to = int(np.lexsort((np.abs(planes - plane), -totals))[0])
            best = max(best, (int(totals[to]), -abs(to - plane), i, to))
        if best[0] == total:
            return np.sort(chosen)
        chosen[best[2]] = best[3]


def _quantiles(strength: NDArray[np.float64], n_cuts: int) -> NDArray[Any]:
    """Return `n_cuts` different planes, each in the middle of an equal share of `strength`."""
    share = np.cumsum(strength) / strength.sum()
    wanted = (np.arange(n_cuts) + 0.5) / n_cuts
    chosen = np.searchsorted(share, wanted).clip(0, strength.size - 1)
    for i in range(1, n_cuts):  # one strong plane may hold several shares
        chosen[i] = max(chosen[i], chosen[i - 1] + 1)
    for i in range(n_cuts - 1, -1, -1):
        last = strength.size - 1 if i == n_cuts - 1 else chosen[i + 1] - 1
        chosen[i] = min(chosen[i], last)
    return chosen


def _spread(low: float, high: float, n_cuts: int) -> list[float]:
    return [float(low + (i + 0.5) * (high - low) / n_cuts) for i in range(n_cuts)]

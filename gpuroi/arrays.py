"""The array door: for volumes that are arrays already, on the host or on the device.

NumPy in, NumPy out; CuPy in, CuPy out, and nothing crosses to the host but scalars. Arrays are
volumes ``(X, Y, Z)`` or batches ``(B, X, Y, Z)``, of any real dtype; results have the same shape.
Voxels that are NaN or infinite are background and rank as zero. Values and cut-offs are in the
units of the map; arrays know nothing of millimetres, so sizes are numbers of voxels.
"""

import math
import numbers
import operator
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuroi.algorithms.threshold import cutoff_above, percentile_scores, usable_cutoffs
from gpuroi.backends import Backend, _keys, get_backend
from gpuroi.checks import check_choice, shown
from gpuroi.types import CONNECTIVITIES, TAILS, Array, Connectivity, FloatArray, Tail

__all__ = ["label", "percentile_cutoff", "region_sizes", "remove_small", "threshold"]


def percentile_cutoff(
    maps: Array, percentile: float, *, tail: Tail = "both", population: Array | None = None
) -> float | NDArray[np.float64]:
    """Return the next number above a percentile of magnitudes, of each volume, in map units.

    With it, `threshold` and `label` keep what is above the percentile, as `extract_regions` does:
    of voxels that tie with it, none. The percentile of n sorted magnitudes is that at place
    ``percentile / 100 * (n - 1)``, counted from 0, interpolated linearly between neighbours:
    definition 7 of Hyndman and Fan, "Sample quantiles in statistical packages", The American
    Statistician 50(4), 1996, doi:10.2307/2684934.

    Parameters
    ----------
    maps : real array (X, Y, Z) or (B, X, Y, Z)
    percentile : float
        From 0 to 100.
    tail : {"both", "positive", "negative"}
        Ranks the magnitudes of all voxels, of those at or above zero, or at or below zero.
    population : bool array, optional
        Ranks only these voxels; of the shape of `maps`, or of one volume for all of them.

    Returns
    -------
    float, or float64 NumPy array (B,) for a batch
        The next number, in the dtype that `threshold` compares in, above what
        `scipy.stats.scoreatpercentile` returns, and above zero; infinity where nobody is ranked.

    Raises
    ------
    TypeError
        If `maps` is no NumPy or CuPy array of real numbers, or `percentile` no number.
    ValueError
        If `percentile` is outside 0 to 100, `tail` none of the above, or a shape does not fit.
    BackendUnavailableError
        If `maps` lie on a CUDA device that cannot compute.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuroi import arrays
    >>> volume = np.arange(-4.0, 5.0).reshape(3, 3, 1)
    >>> cutoff = arrays.percentile_cutoff(volume, 50)
    >>> cutoff
    2.0000000000000004
    >>> arrays.threshold(volume, cutoff).ravel()
    array([-4., -3.,  0.,  0.,  0.,  0.,  0.,  3.,  4.])
    """
    if isinstance(percentile, bool) or not isinstance(percentile, numbers.Real):
        raise TypeError(
            f"percentile={percentile!r} is a {type(percentile).__name__}; pass 0 to 100."
        )
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile={percentile!r} is outside 0 to 100.")
    backend, batch = _batch(maps)
    check_choice("tail", tail, TAILS)
    if population is not None:
        population = backend.xp.asarray(population, bool)
        if population.shape not in (maps.shape, batch.shape[1:]):
            raise ValueError(
                f"population has shape {population.shape}; pass {maps.shape} as the maps, or one "
                f"volume {batch.shape[1:]} for all."
            )
        population = backend.xp.broadcast_to(population, batch.shape)
    scores, _ = percentile_scores(backend, batch, percentile, tail, population)
    cutoffs = cutoff_above(scores, np.dtype(batch.dtype)).astype(np.float64)
    return cutoffs if maps.ndim == 4 else float(cutoffs[0])


def threshold(maps: Array, cutoff: float | Array, *, tail: Tail = "both") -> Array:
    """Return `maps` with every voxel short of `cutoff` set to zero.

    Voxels are compared in float32 for float32 (and float16, and integers up to 16 bits), in float64
    for all others. Voxels at zero are always background.

    Parameters
    ----------
    maps : real array (X, Y, Z) or (B, X, Y, Z)
    cutoff : float or array (B,)
        Magnitude to reach, zero or more, in the units of `maps`: one for all volumes or one each.
        NaN is reached by none.
    tail : {"both", "positive", "negative"}
        Keeps ``abs(x) >= cutoff``, ``x >= cutoff`` or ``x <= -cutoff``.

    Returns
    -------
    array of the shape and dtype of `maps`, in native byte order

    Raises
    ------
    TypeError
        If `maps` is no NumPy or CuPy array of real numbers, or `cutoff` is no number: a percentile
        such as ``"97%"`` is computed by `percentile_cutoff` first.
    ValueError
        If `cutoff` is below zero, `tail` none of the above, or a shape does not fit.
    BackendUnavailableError
        If `maps` lie on a CUDA device that cannot compute.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuroi import arrays
    >>> arrays.threshold(np.array([[[-3.0, 1.0, 2.0]]]), 2.0, tail="positive")
    array([[[0., 0., 2.]]])
    """
    backend, batch = _batch(maps)
    check_choice("tail", tail, TAILS)
    reached = _keys.reaches(backend.xp, batch, _cutoffs(batch, cutoff), tail)
    return backend.xp.where(reached.reshape(maps.shape), maps, maps.dtype.type(0))


def label(
    maps: Array,
    cutoff: float | Array,
    *,
    tail: Tail = "both",
    connectivity: Connectivity = 6,
    min_voxels: int = 1,
) -> tuple[Array, Array]:
    """Return the labels of the regions at or beyond `cutoff`, and how many there are.

    A region is a connected component of the voxels that reach the cut-off, of one sign.

    Parameters
    ----------
    maps : real array (X, Y, Z) or (B, X, Y, Z)
    cutoff : float or array (B,)
        Magnitudes to reach, in the units of `maps`, compared as in `threshold`.
    tail : {"both", "positive", "negative"}
        With ``"both"``, voxels of opposite signs never join one region.
    connectivity : {6, 18, 26}
        Neighbours that join: by faces, edges too, corners too.
    min_voxels : int
        Smaller regions become background.

    Returns
    -------
    labels : int32 array of the shape of `maps`
        0 is background; 1..n by first voxel in C order, in each volume. One sign at a time, these
        are the components of `scipy.ndimage.label`.
    counts : int32 array () or (B,)
        n of each volume.

    Raises
    ------
    TypeError
        If `maps` is no NumPy or CuPy array of real numbers, `cutoff` no number, or `min_voxels` no
        integer. A percentile such as ``"97%"`` is computed by `percentile_cutoff` first.
    ValueError
        If `cutoff` is below zero, `tail` or `connectivity` none of the above, or a shape does not
        fit.
    BackendUnavailableError
        If `maps` lie on a CUDA device that cannot compute.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuroi import arrays
    >>> labels, count = arrays.label(np.array([[[3.0, 0.0, 4.0, -4.0]]]), 2.0)
    >>> labels
    array([[[1, 0, 2, 3]]], dtype=int32)
    """
    backend, batch = _batch(maps)
    labels, counts = backend.components(
        batch,
        _cutoffs(batch, cutoff),
        check_choice("tail", tail, TAILS),
        check_choice("connectivity", connectivity, CONNECTIVITIES),
        operator.index(min_voxels),
    )
    return (labels, counts) if maps.ndim == 4 else (labels[0], counts[0])


def region_sizes(labels: Array) -> Array:
    """Return the number of voxels of labels 0..n, background first.

    Parameters
    ----------
    labels : integer array (X, Y, Z) or (B, X, Y, Z)
        0 is background.

    Returns
    -------
    int64 array (n + 1,) or (B, n + 1)
        In voxels; n is the largest label of all volumes.

    Raises
    ------
    TypeError
        If `labels` is no NumPy or CuPy array of integers.
    ValueError
        If a label is below 0 or above 2147483647, or the shape is none of the above.
    BackendUnavailableError
        If `labels` lie on a CUDA device that cannot compute.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuroi import arrays
    >>> arrays.region_sizes(np.array([[[1, 0, 2, 2]]]))
    array([1, 1, 2])
    """
    xp = _owner(labels).xp
    sizes = _batch_sizes(xp, labels)
    return sizes if labels.ndim == 4 else sizes[0]


def remove_small(labels: Array, min_voxels: int) -> Array:
    """Return labels without regions under `min_voxels`, renumbered 1..n in the same order.

    Each volume of a batch is numbered on its own.

    Parameters
    ----------
    labels : integer array (X, Y, Z) or (B, X, Y, Z)
        0 is background.
    min_voxels : int
        Smaller regions become background; a region of exactly this size is kept.

    Returns
    -------
    int32 array of the shape of `labels`

    Raises
    ------
    TypeError
        If `labels` is no NumPy or CuPy array of integers, or `min_voxels` no integer.
    ValueError
        If a label is below 0 or above 2147483647, or the shape is none of the above.
    BackendUnavailableError
        If `labels` lie on a CUDA device that cannot compute.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuroi import arrays
    >>> arrays.remove_small(np.array([[[1, 0, 2, 2]]]), 2)
    array([[[0, 0, 1, 1]]], dtype=int32)
    """
    xp = _owner(labels).xp
    kept = (_batch_sizes(xp, labels) >= max(1, operator.index(min_voxels))).astype(xp.int32)
    kept[:, :1] = 0
    numbers = (xp.cumsum(kept, axis=1) * kept).astype(xp.int32)
    batch = labels.reshape((len(kept), *labels.shape[-3:])).astype(xp.int64)
    volume = xp.arange(len(kept)).reshape(-1, 1, 1, 1)
    return numbers[volume, batch].reshape(labels.shape)


def _batch_sizes(xp: ModuleType, labels: Array) -> Array:
    """Return sizes ``(B, n + 1)`` of the labels of a volume or batch."""
    if labels.ndim not in (3, 4):
        raise ValueError(f"labels have shape {labels.shape}; pass (X, Y, Z) or (B, X, Y, Z).")
    if labels.dtype.kind not in "iub":
        raise TypeError(f"labels are {labels.dtype}; pass integers.")
    n_volumes = len(labels) if labels.ndim == 4 else 1
    rows = labels.reshape(n_volumes, math.prod(labels.shape[-3:])).astype(xp.int64)
    lowest, highest = (int(rows.min()), int(rows.max())) if rows.size else (0, 0)  # waits
    if lowest < 0 or highest > np.iinfo(np.int32).max:
        raise ValueError(
            f"labels go from {lowest} to {highest}; pass 0 (background) to 2147483647."
        )
    n = highest + 1
    numbered = rows + n * xp.arange(n_volumes).reshape(-1, 1)
    return xp.bincount(numbered.ravel(), minlength=n * n_volumes).reshape(n_volumes, n)


def computable(maps: Array) -> Array:
    """Return `maps` as float32 or float64, whichever holds all their values.

    64-bit integers beyond 2**53 are rounded.
    """
    if maps.dtype.kind not in "fiub":
        raise TypeError(f"maps are {maps.dtype}; pass real numbers.")
    kind, size = maps.dtype.kind, maps.dtype.itemsize
    fits_single = size <= 2 or (kind == "f" and size == 4)
    return maps.astype(np.float32 if fits_single else np.float64, copy=False)


def _owner(array: Array) -> Backend:
    """Return the backend in whose memory `array` lies."""
    if isinstance(array, np.ndarray) and not isinstance(array, np.ma.MaskedArray):
        return get_backend("cpu")
    if _is_cupy(array):
        return get_backend("cuda")
    raise TypeError(f"a {type(array).__name__} is no array of a backend; pass NumPy or CuPy.")


def _is_cupy(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "cupy"


def _batch(maps: Array) -> tuple[Backend, Array]:
    """Return the owner of `maps`, and `maps` as a batch for its verbs."""
    backend = _owner(maps)
    if maps.ndim not in (3, 4):
        raise ValueError(f"maps have shape {maps.shape}; pass (X, Y, Z) or (B, X, Y, Z).")
    xp = backend.xp
    batch = xp.ascontiguousarray(computable(maps))
    batch = xp.where(xp.isfinite(batch), batch, batch.dtype.type(0))
    n_volumes = len(maps) if maps.ndim == 4 else 1
    return backend, batch.reshape((n_volumes, *maps.shape[-3:]))


def _cutoffs(batch: Array, cutoff: float | Array) -> FloatArray:
    """Return `cutoff` as usable magnitudes ``(B,)`` on the host."""
    on_host = _owner(cutoff).to_host(cutoff) if _is_cupy(cutoff) else cutoff  # waits
    try:
        values = np.asarray(on_host)
        is_real = all(isinstance(value, numbers.Real) for value in values.flat)
    except (TypeError, ValueError) as error:  # rows of several lengths
        raise TypeError(_no_cutoff(cutoff)) from error
    if not is_real:
        raise TypeError(_no_cutoff(cutoff))
    values = values.astype(np.float64)
    if values.shape not in ((), (len(batch),)):
        raise ValueError(
            f"cutoff has shape {values.shape}; pass one number, or one for each of the "
            f"{len(batch)} volumes."
        )
    values = np.broadcast_to(values, len(batch))
    if (values < 0).any():
        raise ValueError(f"cutoff={cutoff!r} is below zero; pass magnitudes.")
    return usable_cutoffs(values, batch.dtype)


def _no_cutoff(cutoff: Any) -> str:
    return (
        f"cutoff={shown(cutoff)} is a {type(cutoff).__name__}; pass a magnitude in map units, or "
        "one for each volume; percentile_cutoff returns those of a percentile."
    )

"""Exact order statistics on the CPU."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gpuroi.types import FloatArray

# One value in 61 is enough to guess where the wanted tail begins; a prime does not beat in step
# with the rows of a volume.
_SAMPLE_STRIDE = 61

# Values are sifted in pieces that stay in the cache and below malloc's threshold for fresh pages.
_PIECE = 2**16


def order_statistic(values: FloatArray, ranks: NDArray[np.int64], absolute: bool) -> FloatArray:
    """Return ``np.sort(values)[ranks]``, of the magnitudes if `absolute`, sorting only a tail.

    Percentile thresholds ask for the upper few percent: a pivot that a sample puts below them
    leaves few values to sort. The pivot only decides the speed: a tail that does not reach down
    to the lowest rank is discarded and everything is sorted.
    """
    n = values.size
    lowest = int(ranks.min())
    sample = values[::_SAMPLE_STRIDE]
    sample = np.sort(np.abs(sample) if absolute else sample)
    expected = lowest / n * sample.size
    margin = 2 * np.sqrt(sample.size - expected) + 1
    pivot = sample[max(0, int(expected - margin))]
    if pivot > sample[sample.size // 2]:
        pieces: Iterator[FloatArray] = (values[i : i + _PIECE] for i in range(0, n, _PIECE))
        if absolute:
            pieces = map(np.abs, pieces)
        tail = np.concatenate([piece[piece >= pivot] for piece in pieces])
        if n - tail.size <= lowest:
            return np.sort(tail)[ranks - (n - tail.size)]
    return np.sort(np.abs(values) if absolute else values)[ranks]

"""Exact order statistics on the CPU."""

import numpy as np
from numpy.typing import NDArray

from gpuroi.types import FloatArray

# One value in 61 is enough to guess where the wanted tail begins; a prime does not beat in step
# with the rows of a volume.
_SAMPLE_STRIDE = 61


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
    in_tail = values >= pivot
    if absolute:
        in_tail |= values <= -pivot
    n_tail = np.count_nonzero(in_tail)
    if n_tail > n // 2 or n - n_tail > lowest:
        tail, n_tail = values, n
    else:
        tail = values[in_tail]
    return np.sort(np.abs(tail) if absolute else tail)[ranks - (n - n_tail)]

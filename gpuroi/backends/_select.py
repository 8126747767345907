"""Exact order statistics on the CPU."""

import numpy as np
from numpy.typing import NDArray

from gpuroi.types import FloatArray

# One value in 61 is enough to guess where the wanted tail begins; a prime does not beat in step
# with the rows of a volume.
_SAMPLE_STRIDE = 61


def order_statistic(values: FloatArray, ranks: NDArray[np.int64]) -> FloatArray:
    """Return ``np.sort(values)[ranks]``, sorting no more than the tail that holds the ranks.

    Percentile thresholds ask for the upper few percent: a pivot that a sample puts below them
    leaves few values to sort. The pivot only decides the speed: a tail that does not reach down
    to the lowest rank is discarded and everything is sorted.
    """
    n = values.size
    lowest = int(ranks.min())
    sample = np.sort(values[::_SAMPLE_STRIDE])
    expected = (1 - (n - lowest) / n) * sample.size
    margin = 2 * np.sqrt(sample.size - expected) + 1
    pivot = sample[max(0, int(expected - margin))]
    tail = values[values >= pivot]
    if n - tail.size > lowest or tail.size > n // 2:
        tail = values
    return np.sort(tail)[ranks - (n - tail.size)]

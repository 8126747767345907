"""What neighbours count: SciPy's structuring elements and Gaussian kernels, for array code."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from gpuroi.types import CONNECTIVITIES, Connectivity


def neighbourhood(connectivity: Connectivity) -> NDArray[np.bool_]:
    """Return the structuring element ``(3, 3, 3)`` of 6, 18 or 26 neighbours."""
    rank = CONNECTIVITIES.index(connectivity) + 1
    return np.asarray(ndimage.generate_binary_structure(3, rank))


def gaussian_half_kernel(sigma: float) -> NDArray[np.float64]:
    """Return the weights of `scipy.ndimage.gaussian_filter1d`, from the centre outwards."""
    radius = int(4.0 * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights: NDArray[np.float64] = np.exp(-0.5 / (sigma * sigma) * offsets**2)
    weights /= weights.sum()
    return weights[radius:]

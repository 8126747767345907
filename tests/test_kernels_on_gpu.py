"""Our kernels on a GPU, whichever verbs are the default: what the contract asks of no backend.

Each test is rehearsed with the kernels as C++, on arrays that forgive as little as a GPU's.
"""

import os

import numpy as np
import pytest
from scipy import ndimage

from gpuroi.backends import cuda
from gpuroi.backends._kernels import KernelVerbs
from gpuroi.testing import make_maps, require_backend
from tests.cuda_on_cpu import ITEMS, THREADS, needs_compiler, on_cpu
from tests.cuda_on_cpu.compiler import Fibers
from tests.cuda_on_cpu.device_array import unpacking, xp
from tests.cuda_on_cpu.far import assert_ends_are_as_alone


@pytest.fixture(params=[pytest.param("as C++", marks=needs_compiler), "on a GPU"])
def own_kernels(request, monkeypatch):
    """Return a CUDA backend with kernels of our own for every verb."""
    if request.param == "as C++":
        return on_cpu(KernelVerbs(xp, unpacking(Fibers()), THREADS, ITEMS), xp)
    require_backend("cuda")
    if os.environ.get(cuda.ENVIRONMENT_VARIABLE) == "library":
        pytest.skip("GPUROI_CUDA_KERNELS=library leaves the kernels to another run")
    monkeypatch.setenv(cuda.ENVIRONMENT_VARIABLE, "own")
    return cuda.load()


def test_volumes_beyond_32_bits_are_as_near_ones(own_kernels):
    shape, n_volumes = (7, 8, 9), 6
    if own_kernels.xp is not xp:
        shape, n_volumes = (91, 109, 91), 2400  # at 2 mm
        assert np.prod(shape) * n_volumes > 2**31
        pool = own_kernels.xp.get_default_memory_pool()
        pool.free_all_blocks()
        free, _ = own_kernels.xp.cuda.Device().mem_info
        needed = 6 * 4 * np.prod(shape) * n_volumes  # bytes: six arrays as large as the maps
        if free < needed:
            pytest.skip(f"{free / 1e9:.0f} GB are free on the card, not {needed / 1e9:.0f} GB")
    assert_ends_are_as_alone(own_kernels, make_maps("noise", (4, *shape), "float32", 0), n_volumes)
    if own_kernels.xp is not xp:
        pool.free_all_blocks()


@pytest.mark.parametrize("scale", [1, 10_000], ids=["denormal", "denormal and normal"])
def test_denormal_maps_are_smoothed_as_scipy_does(own_kernels, scale):
    maps = make_maps("denormal", (3, 6, 7, 8), "float32", 0) * np.float32(scale)
    found = own_kernels.to_host(own_kernels.smooth(own_kernels.to_device(maps), (1.0, 0.6, 2.5)))
    expected = ndimage.gaussian_filter(maps, (0, 1.0, 0.6, 2.5))
    np.testing.assert_array_equal(found, expected, strict=True)
    is_denormal = np.abs(expected) < np.finfo(np.float32).tiny
    assert is_denormal.any()
    assert is_denormal.all() == (scale == 1)

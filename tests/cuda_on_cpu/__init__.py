"""The CUDA backend on machines without a GPU: its array code on NumPy, its kernels as C++."""

import os

import numpy as np
import pytest
from scipy import ndimage

from gpuroi.backends import Staging
from gpuroi.backends._kernels import KernelVerbs
from gpuroi.backends._library import LibraryVerbs
from gpuroi.backends._uploads import PinnedUploads
from gpuroi.backends.cpu import CpuBackend
from gpuroi.backends.cuda import VERBS, CudaBackend
from tests.cuda_on_cpu.compiler import Fibers, compiler_is_missing

#: Blocks so small that even small volumes have several chunks, each of two warps.
THREADS, ITEMS = 64, 4


class Copies:
    """What `begin` makes of an array of the host, in the place of copies to a GPU."""

    def __init__(self, begin):
        self._begin = begin

    def __call__(self, host):
        return self._begin(host)

    def staging(self, shape, dtype):
        staging = CpuBackend().staging(shape, dtype)
        return Staging(staging.host, lambda n: self._begin(staging.host[:n]))


def on_cpu(verbs, xp=np, uploads=None):
    """Return a CUDA backend whose device is the memory of the host.

    `uploads` is a function of an array that returns what gives the copy.
    """
    if uploads is None and hasattr(xp, "cuda"):
        copies = PinnedUploads(xp)
    else:
        copies = Copies(uploads or (lambda host: lambda: np.array(host, order="C")))
    return CudaBackend(
        xp,
        dict.fromkeys(VERBS, verbs),
        device="a CPU in the place of a GPU",
        packages={},
        uploads=copies,
        free_bytes=lambda: 2**30,
    )


def library_on_cpu(uploads=None):
    """Return the lines that call CuPy, with NumPy and SciPy in its place."""
    return on_cpu(LibraryVerbs(np, ndimage), uploads=uploads)


def kernels_on_cpu(compiler=None):
    """Return the kernels, run by fibers in an order that changes from launch to launch."""
    return on_cpu(KernelVerbs(np, compiler or Fibers(), THREADS, ITEMS))


def skipped_for(reason):
    """Return a mark that skips a test for `reason`, or does nothing for None.

    Where ``CI`` is set the test runs and fails: nobody sees there what was skipped.
    """
    return pytest.mark.skipif(reason is not None and not os.environ.get("CI"), reason=str(reason))


needs_compiler = skipped_for(compiler_is_missing())

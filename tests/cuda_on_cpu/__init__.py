"""The CUDA backend on machines without a GPU: its array code on NumPy, its kernels as C++."""

import os

import numpy as np
import pytest
from scipy import ndimage

from gpuroi.backends._kernels import KernelVerbs
from gpuroi.backends._library import LibraryVerbs
from gpuroi.backends.cuda import VERBS, CudaBackend
from tests.cuda_on_cpu.compiler import Fibers, compiler_is_missing

#: Blocks so small that even small volumes have several chunks, each of two warps.
THREADS, ITEMS = 64, 4


def on_cpu(verbs, xp=np, uploads=None):
    """Return a CUDA backend whose device is the memory of the host."""
    return CudaBackend(
        xp,
        dict.fromkeys(VERBS, verbs),
        device="a CPU in the place of a GPU",
        packages={},
        uploads=uploads or (lambda host: lambda: xp.asarray(np.array(host, order="C"))),
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

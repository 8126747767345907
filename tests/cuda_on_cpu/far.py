"""Offsets that 32 bits do not hold: launches over billions of elements, of which a few blocks run.

The arrays are zeros that take no memory until something is written.
"""

from tempfile import TemporaryFile

import numpy as np

from gpuroi.backends._kernels import KernelVerbs, source
from gpuroi.backends.cpu import CpuBackend
from gpuroi.testing import make_maps
from tests.cuda_on_cpu import on_cpu
from tests.cuda_on_cpu.cases import assert_same
from tests.cuda_on_cpu.compiler import Fibers

_THREADS, _ITEMS = 64, 64
_BILLIONS = 2**32  # where unsigned products wrap around; signed ones have done so before


class _Sparse:
    """NumPy, with files full of holes as its new arrays."""

    def __getattr__(self, name):
        return getattr(np, name)

    def zeros(self, shape, dtype):
        with TemporaryFile() as file:
            return np.asarray(np.memmap(file, dtype, "w+", shape=shape))

    empty = zeros

    def empty_like(self, array):
        return self.zeros(array.shape, array.dtype)


def assert_ends_are_as_alone(backend, volumes, n_volumes):
    """Assert that each verb answers for `volumes` as the CPU backend does.

    Half of them are the first of a batch, half of them the last, and zeros lie between.
    """
    n, cpu = len(volumes) // 2, CpuBackend()

    def ends(of):
        if isinstance(of, list):
            return of[:n] + of[-n:]
        return np.concatenate([backend.to_host(of[:n]), backend.to_host(of[-n:])])

    maps = backend.xp.zeros((n_volumes, *volumes.shape[1:]), volumes.dtype)
    maps[:n], maps[-n:] = backend.to_device(volumes[:n]), backend.to_device(volumes[n:])
    ranks = np.linspace(0, volumes[0].size - 1, 16, dtype=np.int64)
    cutoffs = np.full(n_volumes, 1.5, volumes.dtype)
    for verb, *arguments in (
        ("order_statistics", np.tile(ranks, (n_volumes, 1)), False, None),
        ("components", cutoffs, "both", 18, 2),
        ("component_voxels", cutoffs, "both", 18, 2),
        ("smooth", (1.0, 0.7, 2.0)),
        ("local_maxima", 2, np.zeros(n_volumes, volumes.dtype)),
    ):
        of_ends = [ends(one) if isinstance(one, np.ndarray) else one for one in arguments]
        expected = getattr(cpu, verb)(volumes, *of_ends)
        found = getattr(backend, verb)(maps, *arguments)
        if not isinstance(found, tuple):
            found, expected = (found,), (expected,)
        for part, right in zip(found, expected, strict=True):
            assert_same(ends(part), right)


def _volumes(change):
    volumes = make_maps("noise", (4, 32, 32, 32), "float32", 0)
    n_volumes = _BILLIONS // volumes[0].size + 2  # the last wrap around to the first

    def of_ends(blocks):
        n = 2 * (blocks // n_volumes)
        return [*range(n), *range(blocks - n, blocks)]

    verbs = KernelVerbs(_Sparse(), change(Fibers(chosen=of_ends)), _THREADS, _ITEMS)
    assert_ends_are_as_alone(on_cpu(verbs, _Sparse()), volumes, n_volumes)


def _last_block_of(name, change, blocks, *arguments):
    """Run the last of so many blocks of a kernel."""
    options = (f"-DTHREADS={_THREADS}", f"-DITEMS={_ITEMS}")
    module = change(Fibers(chosen=lambda blocks: [blocks - 1]))(source(), options)
    scalars = (np.int32(one) if isinstance(one, int) else one for one in arguments)
    module.get_function(name)((blocks,), (_THREADS,), tuple(scalars))


def _chunks(change):
    chunks = 2**12
    n_volumes = _BILLIONS // chunks + 1  # no launch has so many chunks, but no kernel relies on it
    n_kept, counts = (_Sparse().zeros(shape, np.int32) for shape in (n_volumes * chunks, n_volumes))
    n_kept[-3:] = 4, 5, 6
    _last_block_of("number_chunks", change, n_volumes, chunks, n_kept, counts)
    assert n_kept[-3:].tolist() == [0, 4, 9]
    assert counts[-1] == 15


def _labelled_voxels(change):
    size, place = _THREADS * _ITEMS, _BILLIONS + 10
    labels, lists = np.zeros((2, 2, size), np.int32)
    labels[1, [3, 7]], lists[1, :3] = [1, 2], [3, 5, 7]
    index, label = _Sparse().zeros((2, place + 2), np.int32)
    n_listed, ends = np.array([0, 3], np.int32), np.array([place, place + 2])
    _last_block_of(
        *("gather_labelled", change, 2, size, 1, labels, lists, n_listed, ends, index, label)
    )
    assert index[place:].tolist() == [3, 7]
    assert label[place:].tolist() == [1, 2]


#: By what there are billions of: checks of the kernels as a function changes their compiler.
FAR = {"voxels": _volumes, "chunks": _chunks, "labelled voxels": _labelled_voxels}

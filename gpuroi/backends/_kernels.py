"""The verbs of a CUDA backend as launches of the kernels in ``kernels/*.cu``.

A batch goes through a fixed sequence of launches; the host waits for its few results, as often for
many volumes as for one. What a launch looks like is the compiler's business, passed in: CuPy's on a
device, and in the tests one that runs the same files on a CPU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from types import ModuleType
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from gpuroi.backends import LabelledVoxels
from gpuroi.backends._stencils import gaussian_half_kernel, neighbourhood
from gpuroi.types import Array, Connectivity, FloatArray, Tail

# In this order: later files use what earlier ones define.
_SOURCES = ("common.cu", "select.cu", "components.cu", "smooth.cu", "maxima.cu")

# No multiply-add: sums have to round as SciPy's do.
_OPTIONS = ("-fmad=false",)

_DIGITS = 2048  # of a histogram in select.cu
_DIGIT_BITS = 11
_READS_A_THREAD = 64  # of a histogram: enough that emptying it costs little

_TAILS: dict[Tail, int] = {"both": 0, "positive": 1, "negative": -1}


#: Called with blocks, threads a block, and arguments.
Kernel = Callable[[tuple[int], tuple[int], tuple[Any, ...]], None]


class Module(Protocol):
    """Compiled source, as `cupy.RawModule`."""

    def get_function(self, name: str) -> Kernel:
        """Return a kernel by its name."""


#: From source code and compiler options to a module.
Compiler = Callable[[str, tuple[str, ...]], Module]


def source() -> str:
    """Return all kernels as one translation unit."""
    folder = resources.files("gpuroi.backends") / "kernels"
    return "\n".join((folder / name).read_text() for name in _SOURCES)


@dataclass(frozen=True)
class _Grid:
    """A batch of volumes, cut into chunks of `size` voxels of one volume each."""

    n_volumes: int
    shape: tuple[int, int, int]
    size: int

    @classmethod
    def of(cls, maps: Array, size: int) -> "_Grid":
        n_volumes, *shape = maps.shape
        grid = cls(n_volumes, (shape[0], shape[1], shape[2]), size)
        if grid.n_voxels > 2**31 - 1 - size:
            raise ValueError(f"a volume of {grid.n_voxels} voxels is too large for 32-bit labels.")
        return grid

    @property
    def n_voxels(self) -> int:
        return math.prod(self.shape)

    @property
    def chunks(self) -> int:
        """Chunks a volume; an empty volume has one too."""
        return max(1, -(-self.n_voxels // self.size))

    @property
    def n_chunks(self) -> int:
        return self.n_volumes * self.chunks


@dataclass(frozen=True)
class _Components:
    """Labels of a batch, and where they are: what labelling leaves on the device."""

    labels: Array  # int32 (B, X, Y, Z)
    counts: Array  # int32 (B,)
    lists: Array  # int32, the foreground of each chunk
    n_listed: Array  # int32 (n_chunks,)
    n_labelled: Array  # int32 (n_chunks,)


class KernelVerbs:
    """Order statistics, components, smoothing and maxima by kernels of our own.

    Parameters
    ----------
    xp : module
        Where arrays are made.
    compiler : callable
        Compiles source code with options.
    threads, items : int
        Threads a block, and voxels a thread.
    """

    def __init__(
        self, xp: ModuleType, compiler: Compiler, threads: int = 256, items: int = 16
    ) -> None:
        self._xp = xp
        self._compiler = compiler
        self._threads, self._items = threads, items
        self._modules: dict[str, Module] = {}
        self._kernels: dict[tuple[str, str], Kernel] = {}

    def order_statistics(
        self,
        maps: Array,
        ranks: NDArray[np.int64],
        absolute: bool,
        population: Array | None,
    ) -> FloatArray:
        """See `gpuroi.backends.Backend.order_statistics`."""
        steps = ranks - ranks[:, :1]
        if ranks.shape[1] == 2 and ((steps >= 0) & (steps <= 1)).all():  # both by one selection
            found = self._select(maps, ranks[:, :1], absolute, population)
            keys = np.take_along_axis(found[:, 0], steps, axis=1)
        else:
            keys = self._select(maps, ranks, absolute, population)[..., 0]
        if not absolute:
            sign = keys.dtype.type(1 << (8 * keys.itemsize - 1))
            keys = np.where(keys & sign, keys ^ sign, ~keys)
        return cast(FloatArray, keys.view(maps.dtype.name))

    def _select(
        self, maps: Array, ranks: NDArray[np.int64], absolute: bool, population: Array | None
    ) -> NDArray[np.unsignedinteger]:
        """Return the keys ``(B, k, 2)`` at `ranks` ``(B, k)`` and at the ranks after them."""
        xp = self._xp
        grid = _Grid.of(maps, self._threads * _READS_A_THREAD)
        bits = np.dtype(f"uint{8 * maps.dtype.itemsize}")
        # The null pointer: everybody is ranked.
        members = np.uint64(0) if population is None else xp.ascontiguousarray(population)
        keys = xp.zeros(ranks.shape, bits)
        following = xp.full(ranks.shape, np.iinfo(bits).max, bits)
        remaining = xp.asarray(ranks.astype(np.int32, order="C"))
        histograms = xp.zeros((ranks.size, _DIGITS), xp.int32)
        shift = 8 * bits.itemsize
        while shift > 0:
            digit_bits = min(_DIGIT_BITS, shift)
            shift -= digit_bits
            self._launch(
                *(maps.dtype, "count_digits", grid.n_chunks * ranks.shape[1]),
                *(maps, members, grid.n_voxels, grid.chunks, ranks.shape[1], absolute),
                *(keys, following, histograms, shift, digit_bits),
            )
            self._launch(
                *(maps.dtype, "pick_digit", ranks.size),
                *(keys, remaining, following, histograms, digit_bits, shift == 0),
            )
        found: NDArray[np.unsignedinteger] = self._to_host(xp.stack([keys, following], axis=-1))
        return found  # waits

    def components(
        self,
        maps: Array,
        cutoffs: FloatArray,
        tail: Tail,
        connectivity: Connectivity,
        min_voxels: int,
    ) -> tuple[Array, Array]:
        """See `gpuroi.backends.Backend.components`."""
        found = self._components(maps, cutoffs, tail, connectivity, min_voxels)
        return found.labels, found.counts

    def component_voxels(
        self,
        maps: Array,
        cutoffs: FloatArray,
        tail: Tail,
        connectivity: Connectivity,
        min_voxels: int,
    ) -> list[LabelledVoxels]:
        """See `gpuroi.backends.Backend.component_voxels`."""
        xp = self._xp
        grid = _Grid.of(maps, self._chunk)
        found = self._components(maps, cutoffs, tail, connectivity, min_voxels)
        ends = xp.cumsum(found.n_labelled, dtype=xp.int64)
        counts = self._to_host(found.counts).tolist()  # waits
        bounds = [0, *self._to_host(ends[grid.chunks - 1 :: grid.chunks]).tolist()]
        # Whichever is less to copy: a label for every voxel, or an index and a label for some.
        if 2 * bounds[-1] > found.labels.size:
            labels = self._to_host(found.labels).reshape(grid.n_volumes, -1)
            places = [np.flatnonzero(volume) for volume in labels]
            return [
                LabelledVoxels(place, volume[place], n)
                for place, volume, n in zip(places, labels, counts, strict=True)
            ]
        index, label = xp.empty((2, bounds[-1]), xp.int32)
        self._launch(
            *(maps.dtype, "gather_labelled", grid.n_chunks, grid.n_voxels, grid.chunks),
            *(found.labels, found.lists, found.n_listed, ends, index, label),
        )
        index, label = self._to_host(index).astype(np.int64), self._to_host(label)  # waits
        return [
            LabelledVoxels(index[start:stop], label[start:stop], n)
            for (start, stop), n in zip(pairwise(bounds), counts, strict=True)
        ]

    def smooth(self, maps: Array, sigma_voxels: tuple[float, float, float]) -> Array:
        """See `gpuroi.backends.Backend.smooth`."""
        xp = self._xp
        grid = _Grid.of(maps, self._chunk)
        smoothed = maps
        for axis, sigma in enumerate(sigma_voxels):
            if sigma > 0:
                weights = gaussian_half_kernel(sigma)
                before, smoothed = smoothed, xp.empty_like(maps)
                self._launch(
                    *(maps.dtype, "smooth_axis", grid.n_chunks, before, smoothed),
                    *(grid.n_voxels, grid.chunks, grid.shape[axis]),
                    *(math.prod(grid.shape[axis + 1 :]), xp.asarray(weights), weights.size - 1),
                )
        return smoothed.copy() if smoothed is maps else smoothed

    def local_maxima(self, maps: Array, distance: int, floors: FloatArray) -> Array:
        """See `gpuroi.backends.Backend.local_maxima`."""
        xp = self._xp
        grid = _Grid.of(maps, self._chunk)
        distance = min(distance, max(grid.shape))
        forest = _Forest.empty(xp, maps, grid)
        self._launch(
            *(maps.dtype, "list_candidates", grid.n_chunks),
            *(maps, xp.asarray(floors), *grid.shape, grid.chunks, min(distance, 1)),
            *(forest.parents, forest.sizes, forest.lists, forest.n_listed),
        )
        if distance > 1:
            self._launch(
                *(maps.dtype, "reject_candidates", grid.n_chunks),
                *(maps, *grid.shape, grid.chunks, distance),
                *(forest.parents, forest.lists, forest.n_listed),
            )
        return self._label(maps, grid, forest, 6, by_sign=False, min_voxels=1).labels

    def _components(
        self,
        maps: Array,
        cutoffs: FloatArray,
        tail: Tail,
        connectivity: Connectivity,
        min_voxels: int,
    ) -> "_Components":
        xp = self._xp
        grid = _Grid.of(maps, self._chunk)
        forest = _Forest.empty(xp, maps, grid)
        self._launch(
            *(maps.dtype, "threshold", grid.n_chunks),
            *(maps, xp.asarray(cutoffs), _TAILS[tail], grid.n_voxels, grid.chunks),
            *(forest.parents, forest.sizes, forest.lists, forest.n_listed),
        )
        return self._label(maps, grid, forest, connectivity, tail == "both", min_voxels)

    def _label(
        self,
        maps: Array,
        grid: _Grid,
        forest: "_Forest",
        connectivity: Connectivity,
        by_sign: bool,
        min_voxels: int,
    ) -> "_Components":
        """Join the trees of touching voxels and replace parents by labels, in place."""
        xp = self._xp
        min_voxels = max(0, min(min_voxels, grid.n_voxels + 1))
        counts = xp.zeros(grid.n_volumes, xp.int32)
        n_kept = xp.empty(grid.n_chunks, xp.int32)
        where = (grid.n_voxels, grid.chunks)
        trees = (forest.parents, forest.sizes, forest.lists, forest.n_listed)

        def launch(name: str, *arguments: Any) -> None:
            self._launch(maps.dtype, name, grid.n_chunks, *arguments)

        launch(
            *("merge", maps, grid.n_voxels, *grid.shape[1:], grid.chunks),
            *(_preceding(connectivity), by_sign),
            *(forest.parents, forest.lists, forest.n_listed),
        )
        launch("flatten", *where, *trees)
        launch("count_kept", *where, min_voxels, *trees, n_kept)
        self._launch(maps.dtype, "number_chunks", grid.n_volumes, grid.chunks, n_kept, counts)
        launch("number", *where, min_voxels, *trees, n_kept)
        launch("write_labels", *where, *trees, n_kept)
        return _Components(forest.parents, counts, forest.lists, forest.n_listed, n_kept)

    @property
    def _chunk(self) -> int:
        return self._threads * self._items

    def _to_host(self, array: Array) -> Any:
        return array.get() if hasattr(array, "get") else array  # waits

    def _launch(self, dtype: np.dtype, name: str, blocks: int, *arguments: Any) -> None:
        """Run a kernel on the current stream; integers become 32-bit ones."""
        if blocks == 0:
            return
        kernel = self._kernels.get((dtype.name, name))
        if kernel is None:
            kernel = self._module(dtype).get_function(name)
            self._kernels[dtype.name, name] = kernel
        scalars = (np.int32(one) if isinstance(one, int) else one for one in arguments)
        kernel((blocks,), (self._threads,), tuple(scalars))

    def _module(self, dtype: np.dtype) -> Module:
        if dtype.name not in self._modules:
            options = [*_OPTIONS, f"-DTHREADS={self._threads}", f"-DITEMS={self._items}"]
            options += ["-DWIDE"] * (dtype.itemsize == 8)
            self._modules[dtype.name] = self._compiler(source(), tuple(options))
        return self._modules[dtype.name]


@dataclass(frozen=True)
class _Forest:
    """The union-find of a batch: foreground voxels, each a tree of its own at first."""

    parents: Array  # int32 (B, X, Y, Z)
    sizes: Array  # int32 (B, X, Y, Z)
    lists: Array  # int32 (n_chunks, chunk size): the foreground of each chunk
    n_listed: Array  # int32 (n_chunks,)

    @classmethod
    def empty(cls, xp: ModuleType, maps: Array, grid: _Grid) -> "_Forest":
        return cls(
            xp.empty(maps.shape, xp.int32),
            xp.empty(maps.shape, xp.int32),
            xp.empty((grid.n_chunks, grid.size), xp.int32),
            xp.empty(grid.n_chunks, xp.int32),
        )


def _preceding(connectivity: Connectivity) -> int:
    """Return a bit for each of the 13 neighbours before a voxel in C order."""
    before = neighbourhood(connectivity).ravel()[:13]
    return sum(1 << d for d in np.flatnonzero(before).tolist())

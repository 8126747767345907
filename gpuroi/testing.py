"""The suite that every backend must pass; for implementers of new ones too.

Needs pytest. A subclass says which backend it is about, and pytest does the rest::

    class TestMyBackend(BackendContract):
        @pytest.fixture
        def backend(self):
            return require_backend("mine")

Answers are compared with NumPy's and SciPy's for equality: bits, not tolerances.
"""

import itertools
import os
import zlib
from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from gpuroi.backends import Backend, get_backend, names
from gpuroi.errors import BackendUnavailableError, MissingExtraError, UnknownBackendError
from gpuroi.types import CONNECTIVITIES, TAILS, Connectivity, FloatArray, Tail

try:
    import pytest
except ImportError as error:
    raise MissingExtraError(
        f"gpuroi.testing needs pytest, which cannot be imported ({error}); pip install pytest."
    ) from error

__all__ = [
    "KINDS",
    "BackendContract",
    "expected_labels",
    "is_required",
    "make_maps",
    "require_backend",
]

#: Environment variable with names of backends, separated by commas, that must not be skipped.
REQUIRE = "GPUROI_REQUIRE"

#: Kinds of maps that `make_maps` makes.
KINDS = ("noise", "smooth", "plateaus", "mostly zero", "signed zeros", "denormal", "constant")

_DTYPES = ("float32", "float64")


def require_backend(name: str) -> Backend:
    """Return the backend of that name, or skip the test with the reason why it cannot run.

    Where ``GPUROI_REQUIRE`` names it, the test fails instead: a run on a GPU must not pass by
    skipping.

    Parameters
    ----------
    name : str
        Such as ``"cuda"``.

    Returns
    -------
    Backend

    Raises
    ------
    BackendUnavailableError
        If it cannot run here and ``GPUROI_REQUIRE`` names it.
    UnknownBackendError
        If no backend has that name, or one that ``GPUROI_REQUIRE`` holds.
    TypeError
        If `name` is no string.

    Examples
    --------
    >>> from gpuroi.testing import require_backend
    >>> require_backend("cpu").name
    'cpu'
    """
    try:
        return get_backend(name)
    except BackendUnavailableError as reason:
        if is_required(name):
            raise
        pytest.skip(str(reason))


def is_required(name: str) -> bool:
    """Return whether ``GPUROI_REQUIRE`` names this backend.

    Parameters
    ----------
    name : str

    Returns
    -------
    bool

    Raises
    ------
    UnknownBackendError
        If ``GPUROI_REQUIRE`` holds a name that no backend has: a slip there must not skip tests.

    Examples
    --------
    >>> import os
    >>> from gpuroi.testing import is_required
    >>> is_required("cpu") == ("cpu" in os.environ.get("GPUROI_REQUIRE", ""))
    True
    """
    required = {word.strip().lower() for word in os.environ.get(REQUIRE, "").split(",")} - {""}
    for unknown in required - set(names()):
        raise UnknownBackendError(f"{REQUIRE} names {unknown!r}; gpuroi has {', '.join(names())}.")
    return name in required


def make_maps(kind: str, shape: tuple[int, int, int, int], dtype: str, seed: int) -> FloatArray:
    """Return a batch of maps of one of `KINDS`, the same for the same seed.

    Parameters
    ----------
    kind : str
        One of `KINDS`: what there is to go wrong.
    shape : four ints
        (B, X, Y, Z).
    dtype : {"float32", "float64"}
    seed : int

    Returns
    -------
    array (B, X, Y, Z) of `dtype`

    Examples
    --------
    >>> from gpuroi.testing import make_maps
    >>> make_maps("constant", (1, 1, 1, 2), "float32", 0)
    array([[[[1.5, 1.5]]]], dtype=float32)
    """
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode())])
    maps = rng.standard_normal(shape)
    if kind == "smooth":
        maps = ndimage.gaussian_filter(maps, (0, 1, 1, 1)) * 5
    elif kind == "plateaus":
        maps = np.round(maps)
    elif kind == "mostly zero":
        maps *= rng.random(shape) < 0.15
    elif kind == "signed zeros":
        maps[rng.random(shape) < 0.5] = 0.0
        maps[rng.random(shape) < 0.3] = -0.0
    elif kind == "denormal":
        maps *= 1e-41 if dtype == "float32" else 1e-311
    elif kind == "constant":
        maps[:] = 1.5
    return maps.astype(dtype)


def expected_labels(
    volume: FloatArray,
    cutoff: np.floating,
    tail: Tail,
    connectivity: Connectivity,
    min_voxels: int,
) -> NDArray[np.int32]:
    """Return the labels of one volume as `scipy.ndimage.label` finds them, each sign on its own.

    Parameters
    ----------
    volume : float array (X, Y, Z)
    cutoff : scalar of its dtype
        Magnitude to reach, above zero.
    tail : {"both", "positive", "negative"}
    connectivity : {6, 18, 26}
    min_voxels : int
        Smaller regions are background.

    Returns
    -------
    int32 array (X, Y, Z)
        0 is background; 1..n by first voxel in C order.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuroi.testing import expected_labels
    >>> volume = np.array([[[3.0, 0.0, 4.0, -4.0]]])
    >>> expected_labels(volume, np.float64(2), "both", 6, 1)
    array([[[1, 0, 2, 3]]], dtype=int32)
    """
    structure = ndimage.generate_binary_structure(3, CONNECTIVITIES.index(connectivity) + 1)
    masks = {"positive": volume >= cutoff, "negative": volume <= -cutoff}
    regions = []
    for side, mask in masks.items():
        if tail in ("both", side):
            labels, n = ndimage.label(mask, structure)
            regions += [np.flatnonzero(labels == label) for label in range(1, n + 1)]
    expected = np.zeros(volume.size, np.int32)
    large = sorted((voxels for voxels in regions if voxels.size >= min_voxels), key=lambda v: v[0])
    for label, voxels in enumerate(large, start=1):
        expected[voxels] = label
    return expected.reshape(volume.shape)


def _equal(actual: NDArray[np.generic], expected: NDArray[np.generic]) -> None:
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


def _shapes() -> Iterator[tuple[int, int, int, int]]:
    yield from [(1, 1, 1, 1), (1, 7, 5, 1), (2, 1, 9, 4), (3, 6, 7, 8), (2, 11, 4, 13)]


class BackendContract:
    """Tests that are inherited; `backend` is the fixture to provide."""

    @pytest.fixture
    def backend(self) -> Backend:
        """Return the backend under test."""
        raise NotImplementedError("a subclass of BackendContract provides the backend fixture")

    def test_describes_itself(self, backend: Backend) -> None:
        """Names are strings, a batch has a size, versions are named."""
        assert backend.name
        assert backend.device
        assert backend.batch_bytes > 0
        assert backend.versions()["numpy"] == np.__version__

    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("dtype", [*_DTYPES, "bool", "int32"])
    def test_doors_keep_values(
        self, backend: Backend, dtype: str, order: Literal["C", "F"]
    ) -> None:
        """What went to the device comes back as it was."""
        host = np.asarray(np.arange(24).reshape(1, 2, 3, 4) % 5, dtype=dtype, order=order)
        _equal(backend.to_host(backend.to_device(host)), host)

    @pytest.mark.parametrize("absolute", [True, False], ids=["absolute", "signed"])
    @pytest.mark.parametrize("dtype", _DTYPES)
    @pytest.mark.parametrize("kind", KINDS)
    def test_order_statistics(
        self, backend: Backend, kind: str, dtype: str, absolute: bool
    ) -> None:
        """Every rank of every volume, those of its extremes included, is that of a full sort."""
        for seed, shape in enumerate(_shapes()):
            maps = make_maps(kind, shape, dtype, seed)
            n = maps[0].size
            rng = np.random.default_rng(seed)
            ranks = np.sort(
                [[0, n - 1, n // 2, *rng.integers(0, n, 3), n * 97 // 100]] * len(maps), axis=1
            )
            values = np.abs(maps) if absolute else maps
            expected = np.sort(values.reshape(len(maps), -1), axis=1)
            actual = backend.order_statistics(backend.to_device(maps), ranks, absolute, None)
            _equal(actual, np.take_along_axis(expected, ranks, axis=1))

    @pytest.mark.parametrize("absolute", [True, False], ids=["absolute", "signed"])
    @pytest.mark.parametrize("dtype", _DTYPES)
    def test_order_statistics_of_a_population(
        self, backend: Backend, dtype: str, absolute: bool
    ) -> None:
        """Only the population is ranked, and each volume has its own."""
        maps = make_maps("noise", (4, 6, 7, 8), dtype, 0)
        population = np.random.default_rng(1).random(maps.shape) < [
            [[[0.9]]],
            [[[0.5]]],
            [[[0.1]]],
            [[[0.0]]],
        ]
        population[3, 2, 3, 4] = True
        sizes = population.reshape(4, -1).sum(axis=1)
        ranks = np.stack([sizes // 3, sizes - 1], axis=1)
        actual = backend.order_statistics(
            backend.to_device(maps), ranks, absolute, backend.to_device(population)
        )
        for b in range(4):
            ranked = np.sort(np.abs(maps[b][population[b]]) if absolute else maps[b][population[b]])
            _equal(actual[b], ranked[ranks[b]])

    @pytest.mark.parametrize("tail", TAILS)
    @pytest.mark.parametrize("connectivity", CONNECTIVITIES)
    @pytest.mark.parametrize("kind", KINDS)
    def test_components(
        self, backend: Backend, kind: str, connectivity: Connectivity, tail: Tail
    ) -> None:
        """Labels and counts are SciPy's, for dense and sparse foreground and every size filter."""
        for seed, (shape, dtype) in enumerate(itertools.product(_shapes(), _DTYPES)):
            maps = make_maps(kind, shape, dtype, seed)
            quantile = (0.0, 0.5, 0.8, 0.97)[seed % 4]
            smallest = np.finfo(dtype).smallest_subnormal
            cutoffs = np.array(
                [max(np.quantile(np.abs(volume), quantile), smallest) for volume in maps], dtype
            )
            min_voxels = (0, 1, 2, 5)[seed // 2 % 4]
            expected = np.stack(
                [
                    expected_labels(volume, cutoff, tail, connectivity, min_voxels)
                    for volume, cutoff in zip(maps, cutoffs, strict=True)
                ]
            )
            device = backend.to_device(maps)
            labels, counts = backend.components(device, cutoffs, tail, connectivity, min_voxels)
            _equal(backend.to_host(labels), expected)
            _equal(backend.to_host(counts), expected.max(axis=(1, 2, 3)).astype(np.int32))

            found = backend.component_voxels(device, cutoffs, tail, connectivity, min_voxels)
            assert [volume.n_regions for volume in found] == backend.to_host(counts).tolist()
            for volume, volume_labels in zip(found, expected, strict=True):
                _equal(volume.index, np.flatnonzero(volume_labels))
                _equal(volume.label, volume_labels[volume_labels > 0])

    def test_opposite_signs_never_join(self, backend: Backend) -> None:
        """A checkerboard of signs, all voxels touching, has a region a voxel."""
        maps = np.where(np.indices((4, 4, 4)).sum(axis=0) % 2, 1.0, -1.0)[np.newaxis]
        _, counts = backend.components(backend.to_device(maps), np.ones(1), "both", 6, 1)
        assert backend.to_host(counts).tolist() == [64]

    def test_a_batch_of_nothing(self, backend: Backend) -> None:
        """A batch without volumes, and volumes without voxels, come back as they went."""
        for shape in ((0, 3, 4, 5), (2, 3, 0, 5)):
            maps = backend.to_device(np.zeros(shape, np.float32))
            cutoffs = np.ones(len(maps), np.float32)
            labels, counts = backend.components(maps, cutoffs, "both", 6, 1)
            assert labels.shape == shape
            assert backend.to_host(counts).tolist() == [0] * len(maps)
            assert len(backend.component_voxels(maps, cutoffs, "both", 6, 1)) == len(maps)

    def test_nothing_reaches_an_infinite_cutoff(self, backend: Backend) -> None:
        """The cut-off of an empty population leaves background."""
        maps = make_maps("noise", (2, 3, 4, 5), "float32", 0)
        cutoffs = np.full(2, np.inf, np.float32)
        labels, counts = backend.components(backend.to_device(maps), cutoffs, "both", 26, 0)
        assert not backend.to_host(labels).any()
        assert backend.to_host(counts).tolist() == [0, 0]

    def test_a_snake_is_one_region(self, backend: Backend) -> None:
        """A path that winds through a volume, the worst case of label propagation, stays whole."""
        snake = np.zeros((1, 15, 15, 15), np.float32)
        snake[0, ::2, ::2] = 1  # rows of voxels along z
        snake[0, ::2, 1::4, -1] = snake[0, ::2, 3::4, 0] = 1  # joined at alternating ends
        snake[0, 1::4, -1, -1] = snake[0, 3::4, 0, 0] = 1
        _, count = ndimage.label(snake[0])
        assert count == 1
        labels, counts = backend.components(
            backend.to_device(snake), np.ones(1, np.float32), "both", 6, 1
        )
        assert backend.to_host(counts).tolist() == [1]
        _equal(backend.to_host(labels), snake.astype(np.int32))

    @pytest.mark.parametrize("sigma", [(1.0, 1.0, 1.0), (0.0, 2.5, 0.4), (0.85, 0.0, 4.0)])
    @pytest.mark.parametrize("dtype", _DTYPES)
    def test_smooth(self, backend: Backend, dtype: str, sigma: tuple[float, float, float]) -> None:
        """Each axis is SciPy's gaussian_filter1d, rounded in between, kernels beyond the border."""
        # Not the denormal ones: devices may flush what converts to float64 from below 1.2e-38.
        for seed, (shape, kind) in enumerate(
            itertools.product(_shapes(), ("noise", "mostly zero", "signed zeros"))
        ):
            maps = make_maps(kind, shape, dtype, seed)
            maps[:, : maps.shape[1] // 3] = 0  # smoothing may leave out what is far from a value
            expected = maps.copy()
            for axis, axis_sigma in enumerate(sigma, start=1):
                if axis_sigma > 0:
                    expected = ndimage.gaussian_filter1d(expected, axis_sigma, axis=axis)
            _equal(backend.to_host(backend.smooth(backend.to_device(maps), sigma)), expected)

    @pytest.mark.parametrize("distance", [0, 1, 3, 10])
    @pytest.mark.parametrize("dtype", _DTYPES)
    @pytest.mark.parametrize("kind", KINDS)
    def test_local_maxima(self, backend: Backend, kind: str, dtype: str, distance: int) -> None:
        """Seeds are the labelled maxima of SciPy's maximum filter above the floor."""
        for seed, shape in enumerate(_shapes()):
            maps = make_maps(kind, shape, dtype, seed)
            floors = np.maximum(maps.max(axis=(1, 2, 3)) * maps.dtype.type(0.1), 0)
            expected = []
            for volume, floor in zip(maps, floors, strict=True):
                highest = ndimage.maximum_filter(volume, 2 * distance + 1, mode="constant")
                labels, _ = ndimage.label((volume == highest) & (volume > floor))
                expected.append(labels.astype(np.int32))
            seeds = backend.local_maxima(backend.to_device(maps), distance, floors)
            _equal(backend.to_host(seeds), np.stack(expected))

    def test_leaves_its_input_alone(self, backend: Backend) -> None:
        """No verb writes into the maps it is given."""
        maps = make_maps("smooth", (2, 6, 7, 8), "float32", 0)
        device = backend.to_device(maps.copy())
        cutoffs = np.full(2, 0.5, np.float32)
        backend.order_statistics(device, np.array([[3], [4]]), True, None)
        backend.components(device, cutoffs, "both", 18, 2)
        backend.component_voxels(device, cutoffs, "both", 18, 2)
        backend.smooth(device, (1.0, 1.0, 1.0))
        backend.smooth(device, (0.0, 0.0, 0.0))
        backend.local_maxima(device, 2, cutoffs)
        _equal(backend.to_host(device), maps)

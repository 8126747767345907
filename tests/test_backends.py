"""Every backend passes the contract; and how one is found and chosen."""

import contextlib
import sys
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import ndimage

from gpuroi import backends
from gpuroi.backends import cuda
from gpuroi.backends._kernels import _Grid
from gpuroi.backends._library import LibraryVerbs
from gpuroi.backends._select import order_statistic
from gpuroi.backends.cpu import CpuBackend, cc3d
from gpuroi.errors import BackendUnavailableError, DeviceFullError, UnknownBackendError
from gpuroi.testing import BackendContract, is_required, make_maps, require_backend
from tests.cuda_on_cpu import kernels_on_cpu, library_on_cpu


class TestInstalledBackends(BackendContract):
    @pytest.fixture(params=backends.names())
    def backend(self, request):
        return require_backend(request.param)


class TestCpuBackendWithoutExtras(BackendContract):
    @pytest.fixture
    def backend(self):
        return CpuBackend(use_cc3d=False)


class TestLibraryVerbsOnNumpy(BackendContract):
    """The lines of the CUDA backend that call CuPy, with NumPy and SciPy in the place of CuPy.

    Shows that the array operations are the right ones; how CuPy carries them out on a device is
    for the run with GPUROI_REQUIRE=cuda to show.
    """

    @pytest.fixture
    def backend(self):
        return library_on_cpu()


@pytest.mark.skipif(cc3d is None, reason="connected-components-3d is not installed")
def test_cc3d_is_used_where_installed_and_named_in_the_versions():
    assert CpuBackend().versions()["connected-components-3d"] == version("connected-components-3d")
    assert "connected-components-3d" not in CpuBackend(use_cc3d=False).versions()


def test_cucim_labels_agree_with_the_cuda_backend():
    cuda = require_backend("cuda")
    if not is_required("cuda"):
        pytest.importorskip("cucim")
    from cucim.skimage import measure

    maps = cuda.to_device(make_maps("smooth", (4, 21, 22, 23), "float32", 0))
    for connectivity, rank in ((6, 1), (18, 2), (26, 3)):
        labels, _ = cuda.components(maps, np.full(4, 0.5, np.float32), "positive", connectivity, 1)
        for volume, expected in zip(maps, labels, strict=True):
            # As integers: cuCIM casts floats to int before it labels, and 0.5 becomes background.
            foreground = (volume >= np.float32(0.5)).astype(np.int32)
            np.testing.assert_array_equal(
                cuda.to_host(measure.label(foreground, connectivity=rank)), cuda.to_host(expected)
            )


def test_volumes_beyond_the_index_range_of_one_launch_go_in_pieces(monkeypatch):
    monkeypatch.setattr("gpuroi.backends._library._MAX_VOXELS", 2 * 5 * 6 * 7)
    cuda = library_on_cpu()
    maps = make_maps("smooth", (5, 5, 6, 7), "float32", 3)
    cutoffs = np.linspace(0.2, 1, 5).astype(np.float32)
    pieces = cuda.components(maps, cutoffs, "both", 18, 2)
    for actual, expected in zip(
        pieces, CpuBackend().components(maps, cutoffs, "both", 18, 2), strict=True
    ):
        np.testing.assert_array_equal(actual, expected)
    for voxels, labels in zip(
        cuda.component_voxels(maps, cutoffs, "both", 18, 2), pieces[0], strict=True
    ):
        np.testing.assert_array_equal(voxels.index, np.flatnonzero(labels))
        np.testing.assert_array_equal(voxels.label, labels[labels > 0])
        assert voxels.n_regions == labels.max()
    monkeypatch.setattr("gpuroi.backends._library._MAX_VOXELS", 100)
    with pytest.raises(ValueError, match="a volume of 210 voxels is too large for 32-bit labels"):
        cuda.components(maps, cutoffs, "both", 18, 2)


def test_a_sample_that_misleads_costs_time_only():
    """Every sampled value is an outlier, so the pivot leaves too few values in the tail."""
    values = np.random.default_rng(0).standard_normal(61 * 300)
    values[::61] += 1e6
    ranks = np.array([values.size * 97 // 100, values.size * 97 // 100 + 1])
    for absolute in (True, False):
        expected = np.sort(np.abs(values) if absolute else values)[ranks]
        np.testing.assert_array_equal(order_statistic(values, ranks, absolute), expected)


class TestChoiceOfKernels:
    @pytest.mark.parametrize(
        ("choice", "verbs"),
        [(None, cuda.PROVEN), ("", cuda.PROVEN), ("own", set(cuda.VERBS)), ("library", set())],
    )
    def test_by_the_environment(self, monkeypatch, choice, verbs):
        if choice is None:
            monkeypatch.delenv("GPUROI_CUDA_KERNELS", raising=False)
        else:
            monkeypatch.setenv("GPUROI_CUDA_KERNELS", choice)
        assert cuda.chosen_kernels() == verbs

    def test_an_unknown_choice_is_an_error(self, monkeypatch):
        monkeypatch.setenv("GPUROI_CUDA_KERNELS", "fast")
        with pytest.raises(
            UnknownBackendError,
            match="GPUROI_CUDA_KERNELS='fast' is neither 'own' nor 'library'",
        ):
            cuda.chosen_kernels()

    def test_the_versions_name_the_verbs_of_kernels(self):
        assert library_on_cpu().versions()["cuda-kernels"] == "none: CuPy for every verb"
        assert kernels_on_cpu().versions()["cuda-kernels"] == ", ".join(cuda.VERBS)


class FirstKernel:
    """What CuPy makes of ``arange``, with another sum."""

    def __init__(self, outcome):
        self.outcome = outcome

    def sum(self):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class TestLoadingCuda:
    """With as much of CuPy as loading the backend uses."""

    @pytest.fixture
    def cupy(self, monkeypatch):
        class CUDARuntimeError(RuntimeError):
            pass

        cupy = SimpleNamespace(
            __version__="14",
            int32=np.int32,
            first=6,
            current=0,
            asked=[],
            arange=lambda n, dtype: FirstKernel(cupy.first),
            get_default_memory_pool=lambda: SimpleNamespace(free_bytes=lambda: 24_000),
            cuda=SimpleNamespace(
                Device=lambda: SimpleNamespace(id=cupy.current, mem_info=(48_000, 10**6)),
                runtime=SimpleNamespace(
                    CUDARuntimeError=CUDARuntimeError,
                    getDeviceCount=lambda: 2,
                    getDeviceProperties=lambda device: (
                        cupy.asked.append(device) or {"name": f"card {device}".encode()}
                    ),
                    runtimeGetVersion=lambda: 13000,
                    driverGetVersion=lambda: 13000,
                ),
            ),
        )
        ndimage = SimpleNamespace()
        parts = {"scipy": SimpleNamespace(ndimage=ndimage), "scipy.ndimage": ndimage}
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setitem(sys.modules, "cupyx", SimpleNamespace(scipy=parts["scipy"]))
        for name, part in parts.items():
            monkeypatch.setitem(sys.modules, f"cupyx.{name}", part)
        monkeypatch.delenv("GPUROI_BACKEND", raising=False)
        backends._load.cache_clear()
        yield cupy
        backends._load.cache_clear()

    def test_it_is_called_what_the_current_device_is_called(self, cupy):
        backend = cuda.load()
        assert backend.device == "card 0"
        cupy.current = 1
        assert backend.device == backend.device == "card 1"
        assert cupy.asked == [0, 1]

    def test_memory_that_cupy_keeps_is_free(self, cupy):
        assert cuda.load().batch_bytes == 3000

    @pytest.mark.parametrize(
        "error",
        [
            MemoryError("Out of memory allocating 512 bytes"),
            RuntimeError("cudaErrorMemoryAllocation: out of memory"),
        ],
    )
    def test_a_full_device_is_not_a_broken_one(self, cupy, error):
        cupy.first = error
        with pytest.raises(DeviceFullError, match=f"no memory left for a first kernel .{error}.; "):
            backends.get_backend("cuda")
        with pytest.warns(UserWarning, match="'auto' does without 'cuda': the CUDA device has no"):
            assert backends.get_backend("auto").name == "cpu"
        assert "no memory left" in backends.available_backends()["cuda"]
        cupy.first = 6
        assert backends.get_backend("auto").name == "cuda"

    def test_a_device_that_cannot_compile_or_count_is_not_used(self, cupy):
        for first, message in (
            (RuntimeError("no nvrtc"), r"cannot compile .*\(RuntimeError: no nvrtc\); pip install"),
            (7, r"the CUDA device computed 0\+1\+2\+3 = 7; it is faulty"),
        ):
            cupy.first = first
            with pytest.raises(BackendUnavailableError, match=message):
                cuda.load()
            assert backends.get_backend("auto").name == "cpu"  # of which nothing is to be said


def test_a_volume_and_its_last_chunk_are_within_32_bits():
    chunk = 4096
    for n_voxels, fits in ((2**31 - 1 - chunk, True), (2**31 - chunk, False)):
        maps = SimpleNamespace(shape=(1, n_voxels, 1, 1))
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="too large"):
            assert _Grid.of(maps, chunk).chunks * chunk <= 2**31 - 1


def test_a_batch_takes_a_part_of_the_memory_that_is_free():
    free = 24 * 1000
    backend = cuda.CudaBackend(
        np,
        dict.fromkeys(cuda.VERBS, LibraryVerbs(np, ndimage)),
        device="",
        packages={},
        uploads=lambda host: lambda: host,
        free_bytes=lambda: free,
    )
    assert backend.batch_bytes == 1000
    free = 0
    assert backend.batch_bytes == 1  # a volume goes alone, and fits or does not
    free = 2**40
    assert backend.batch_bytes == 64 * 2**20


def test_discovery_is_by_file_name():
    assert backends.names() == ("cpu", "cuda")
    assert set(backends.PREFERENCE) <= set(backends.names())


def test_available_backends_gives_none_or_the_reason():
    available = backends.available_backends()
    assert available["cpu"] is None
    assert available["cuda"] is None or "CUDA" in available["cuda"] or "CuPy" in available["cuda"]


def test_argument_beats_environment_beats_auto(monkeypatch):
    monkeypatch.setenv("GPUROI_BACKEND", "cpu")
    assert backends.get_backend().name == "cpu"
    monkeypatch.setenv("GPUROI_BACKEND", "abacus")
    assert backends.get_backend("cpu").name == "cpu"
    with pytest.raises(
        UnknownBackendError, match=r"GPUROI_BACKEND='abacus' is unknown; .*cpu, cuda"
    ):
        backends.get_backend()
    monkeypatch.setenv("GPUROI_BACKEND", "")
    assert backends.get_backend("auto").name in backends.names()


def test_an_unknown_name_is_told_from_a_missing_dependency(monkeypatch):
    with pytest.raises(UnknownBackendError, match="backend='tpu' is unknown; gpuroi has cpu, cuda"):
        backends.get_backend("tpu")
    monkeypatch.setitem(sys.modules, "cupy", None)
    backends._load.cache_clear()
    try:
        with pytest.raises(BackendUnavailableError, match=r"CuPy cannot be .*gpuroi\[cuda13\]"):
            backends.get_backend("cuda")
        assert backends.get_backend("auto").name == "cpu"  # auto may fall back, a name may not
    finally:
        backends._load.cache_clear()


def test_an_instance_is_a_choice_too():
    backend = CpuBackend()
    assert backends.get_backend(backend) is backend
    with pytest.raises(TypeError, match="backend=3 is not a backend"):
        backends.get_backend(3)


def test_require_fails_where_skipping_would_hide_a_missing_device(monkeypatch):
    def unavailable(name):
        raise BackendUnavailableError("no CUDA device")

    monkeypatch.setattr("gpuroi.testing.get_backend", unavailable)
    monkeypatch.delenv("GPUROI_REQUIRE", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no CUDA device"):
        require_backend("cuda")
    for names in ("cuda", "cpu, CUDA"):
        monkeypatch.setenv("GPUROI_REQUIRE", names)
        with pytest.raises(BackendUnavailableError):
            require_backend("cuda")
    monkeypatch.setenv("GPUROI_REQUIRE", "cuda13")
    with pytest.raises(UnknownBackendError, match="GPUROI_REQUIRE names 'cuda13'; gpuroi has cpu"):
        require_backend("cuda")

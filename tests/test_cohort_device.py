"""A cohort with a process for the device: what it hands over, and what becomes of it when it dies.

The CPU backend stands in the device's place: what is tested is the way there and back.
"""

import multiprocessing
import os
import signal
import sys
import threading
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from gpuroi import backends, io
from gpuroi.backends import cpu
from gpuroi.cohort import _consumer, _run, extract_cohort
from gpuroi.cohort._consumer import Consumer, RemoteFinder
from gpuroi.errors import BackendUnavailableError, DeviceLostError, DeviceMemoryError
from gpuroi.pipeline import Finder, prepare
from gpuroi.recipe import make_recipe
from tests.cohort_files import RECIPE, contents, save_maps
from tests.conftest import image


@pytest.fixture
def cohort(tmp_path, blobs):
    """Return a folder with eight maps, two of them on another grid, and one of float64."""
    save_maps(tmp_path / "maps", [f"a{i}.nii.gz" for i in range(5)], blobs)
    save_maps(tmp_path / "maps", [f"b{i}.nii.gz" for i in range(2)], blobs, shape=(9, 10, 11))
    nib.save(image(blobs((12, 13, 14)).astype(np.float64)), tmp_path / "maps" / "c.nii.gz")
    return tmp_path / "maps"


@pytest.fixture
def consumers(monkeypatch):
    """Give every run a process for the device, and return them as they are started."""
    started = []

    class Watched(Consumer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            started.append(self)

    monkeypatch.setattr(_run, "_is_device", lambda backend: True)
    monkeypatch.setattr(_run, "Consumer", Watched)
    return started


@pytest.fixture
def serve(monkeypatch):
    """Return a function that serves a backend in a thread, and returns what connects to it."""
    ends = []

    def begin(recipe, backend):
        monkeypatch.setattr(_consumer, "get_backend", backend)
        control, theirs = multiprocessing.Pipe()
        consumption = _consumer._Consumption(theirs, "device", recipe)
        thread = threading.Thread(target=consumption.serve)
        thread.start()
        ends.append((control, thread))

        def connect():
            ours, connection = multiprocessing.Pipe()
            control.send(connection)
            assert control.recv() == "connected"
            connection.close()
            return RemoteFinder(ours)

        return connect

    yield begin
    for control, thread in ends:
        control.close()
        thread.join(10)
        assert not thread.is_alive()


class Device(cpu.CpuBackend):
    """The CPU backend, with a device's liking for batches; `fail` is called with each of them."""

    name = "device"
    batch_bytes = 100_000

    def __init__(self, fail=lambda maps: None):
        super().__init__()
        self.fail = fail

    def component_voxels(self, maps, *arguments):
        self.fail(maps)
        return super().component_voxels(maps, *arguments)


class TestHandingOver:
    @pytest.mark.parametrize("shares_memory", [True, False])
    @pytest.mark.parametrize("method", ["connected_components", "local_regions"])
    def test_what_is_found_there_is_what_is_found_here(
        self, serve, blobs, method, shares_memory, monkeypatch
    ):
        if not shares_memory:
            monkeypatch.delattr(os, "memfd_create", raising=False)
        recipe = make_recipe("90%", min_region_size=20, method=method, smoothing_fwhm=2)
        finder = serve(recipe, lambda name: Device())()
        here = Finder(recipe, Device())
        for n_maps, shape in [(2, (9, 10, 11)), (5, (12, 13, 14)), (1, (12, 13, 14))]:
            batch = [prepare(*io.read_maps(image(blobs(shape, seed=i)))) for i in range(n_maps)]
            for found, expected in zip(finder(batch), here(batch), strict=True):
                assert (found.cutoff, found.score) == (expected.cutoff, expected.score)
                pairs = [(found.voxels, expected.voxels)]
                if method == "local_regions":
                    pairs = zip(found.voxels.sides, expected.voxels.sides, strict=True)
                for one, other in pairs:
                    for name in vars(one):
                        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))

    def test_an_error_that_nobody_foresaw_is_of_the_map_not_of_the_device(self, serve, blobs):
        class Odd(Exception):  # which cannot be sent: its class has no place
            def __init__(self, one, other):
                super().__init__("odd")

        def fails(maps):
            raise Odd(1, 2)

        finder = serve(make_recipe(3.0), lambda name: Device(fails))()
        with pytest.raises(ValueError, match="Odd: odd"):
            finder([prepare(*io.read_maps(image(blobs())))])

    def test_what_the_device_is(self, serve):
        finder = serve(make_recipe(), lambda name: Device())()
        assert (finder.computed_by.name, finder.batch_bytes) == ("device", 100_000)
        assert finder.computed_by.versions == cpu.load().versions()

    def test_a_backend_that_cannot_start_says_why(self, serve, blobs):
        def cannot(name):
            raise BackendUnavailableError("no driver")

        finder = serve(make_recipe(), cannot)()
        with pytest.raises(BackendUnavailableError, match="no driver"):
            finder(batch=[prepare(*io.read_maps(image(blobs())))])

    def test_one_map_that_does_not_fit_is_told(self, serve, blobs):
        def is_too_large(maps):
            raise MemoryError("full")

        finder = serve(make_recipe(3.0), lambda name: Device(is_too_large))()
        batch = [prepare(*io.read_maps(image(blobs())))]
        for _ in range(2):  # and the device goes on
            with pytest.raises(DeviceMemoryError, match="does not fit on"):
                finder(batch)

    def test_what_did_not_fit_is_not_sent_again(self, serve, blobs):
        def holds_two(maps):
            if len(maps) > 2:
                raise MemoryError("full")

        maps = [prepare(*io.read_maps(image(blobs(seed=seed)))) for seed in range(8)]
        connect = serve(make_recipe("90%"), lambda name: Device(holds_two))
        finder, other = connect(), connect()
        assert finder.batch_bytes == other.batch_bytes == 100_000
        assert len(finder(maps)) == 8
        assert finder.batch_bytes == 2 * maps[0].volume.nbytes
        other(maps[:1])
        assert other.batch_bytes == finder.batch_bytes

    def test_several_processes_are_answered_each_its_own(self, serve, blobs):
        recipe = make_recipe("90%")
        finders = [connect() for connect in [serve(recipe, lambda name: Device())] * 3]
        maps = [prepare(*io.read_maps(image(blobs(seed=seed)))) for seed in range(3)]
        here = [found.cutoff for found in Finder(recipe, Device())(maps)]
        results = [[], [], []]

        def ask(number):
            for _ in range(20):
                results[number] += [found.cutoff for found in finders[number]([maps[number]])]

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert results == [[cutoff] * 20 for cutoff in here]


class TestCohorts:
    @pytest.mark.parametrize("method", ["connected_components", "local_regions"])
    def test_the_same_files_as_without(self, cohort, tmp_path, consumers, monkeypatch, method):
        recipe = RECIPE | {"method": method, "smoothing_fwhm": 2}
        extract_cohort(cohort, tmp_path / "with", recipe, jobs=2, batch_size=3, backend="cpu")
        assert len(consumers) == 1
        monkeypatch.undo()
        extract_cohort(cohort, tmp_path / "without", recipe, jobs=2, backend="cpu")
        assert contents(tmp_path / "with") == contents(tmp_path / "without")

    def test_a_process_for_each_device(self, cohort, tmp_path, consumers, monkeypatch):
        monkeypatch.setattr(_run, "environments", lambda name: [{"WHICH": "0"}, {"WHICH": "1"}])
        report = extract_cohort(cohort, tmp_path / "out", RECIPE, jobs=2, backend="cpu")
        assert (report.n_done, len(consumers)) == (8, 2)
        assert not any(consumer._process.is_alive() for consumer in consumers)

    def test_a_damaged_map_costs_only_itself(self, cohort, tmp_path, consumers):
        whole = (cohort / "a3.nii.gz").read_bytes()
        (cohort / "a3.nii.gz").write_bytes(whole[:-9])
        report = extract_cohort(
            cohort, tmp_path / "out", RECIPE, jobs=1, batch_size=8, backend="cpu"
        )
        assert (report.n_done, [one.stem for one in report.failures]) == (7, ["a3"])

    def test_a_map_that_does_not_fit_its_mask_costs_only_itself(self, cohort, tmp_path, consumers):
        recipe = RECIPE | {"mask_img": image(np.ones((12, 13, 14), np.uint8))}
        report = extract_cohort(
            cohort, tmp_path / "out", recipe, jobs=1, batch_size=8, backend="cpu"
        )
        assert sorted(one.stem for one in report.failures) == ["b0", "b1"]
        assert "is on another grid" in report.failures[0].message

    def test_a_device_that_is_lost_ends_the_run_which_can_be_gone_on_with(
        self, cohort, tmp_path, consumers, monkeypatch
    ):
        def lose(progress):
            if progress.n_done == 2:
                os.kill(consumers[0]._process.pid, signal.SIGKILL)

        options = {"jobs": 1, "batch_size": 1, "backend": "cpu"}
        with pytest.raises(DeviceLostError, match=r"process of the device has ended.*run again"):
            extract_cohort(cohort, tmp_path / "out", RECIPE, **options, on_progress=lose)
        assert not list((tmp_path / "out").rglob("*.tmp"))
        report = extract_cohort(cohort, tmp_path / "out", RECIPE, **options)
        assert report.n_skipped >= 2
        assert report.n_done + report.n_skipped == 8
        monkeypatch.undo()
        extract_cohort(cohort, tmp_path / "calm", RECIPE, jobs=2, backend="cpu")
        assert contents(tmp_path / "out") == contents(tmp_path / "calm")

    def test_the_cpu_may_take_its_place(self, cohort, tmp_path, consumers):
        def lose(progress):
            warnings.extend(progress.latest.warnings if progress.latest else ())
            if progress.n_done == 1:
                os.kill(consumers[0]._process.pid, signal.SIGKILL)

        warnings = []
        report = extract_cohort(
            cohort,
            tmp_path / "out",
            RECIPE,
            jobs=2,
            batch_size=1,
            backend="cpu",
            on_gpu_error="cpu",
            on_progress=lose,
        )
        assert (report.n_done, report.failures) == (8, ())
        assert 1 <= len(warnings) <= 2  # each of the two processes says it once
        assert warnings[0].endswith("has ended. The CPU goes on in its place.")
        extract_cohort(cohort, tmp_path / "calm", RECIPE, jobs=1, backend="cpu")
        assert contents(tmp_path / "out") == contents(tmp_path / "calm")

    def test_only_these_two_ways_to_go_on(self, cohort, tmp_path):
        with pytest.raises(ValueError, match="on_gpu_error='gpu' is not one of 'stop', 'cpu'"):
            extract_cohort(cohort, tmp_path / "out", RECIPE, on_gpu_error="gpu")


class TestEnvironments:
    @pytest.mark.parametrize(
        ("visible", "expected"), [(None, ["0", "1"]), ("3, 5", ["3", "5"]), ("GPU-ab", ["GPU-ab"])]
    )
    def test_each_device_is_seen_alone(self, monkeypatch, visible, expected):
        runtime = SimpleNamespace(getDeviceCount=lambda: len(expected))
        cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        named = [one["CUDA_VISIBLE_DEVICES"] for one in backends.environments("cuda")]
        assert named == expected

    def test_a_host_is_one(self):
        assert backends.environments("cpu") == [{}]

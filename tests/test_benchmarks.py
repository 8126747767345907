"""Each benchmark case runs, does the same work on both sides, and leaves a line behind."""

import json
import re
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from benchmarks import gpu, report, run
from benchmarks.cases import CASES
from gpuroi.algorithms import local_regions
from gpuroi.backends import LabelledVoxels
from gpuroi.backends._kernels import KernelVerbs
from gpuroi.backends._library import LibraryVerbs
from gpuroi.backends.cpu import CpuBackend
from gpuroi.errors import BackendUnavailableError
from tests.cuda_on_cpu import ITEMS, THREADS, library_on_cpu, needs_compiler, on_cpu
from tests.cuda_on_cpu.compiler import Fibers
from tests.cuda_on_cpu.device_array import filters, unpacking, xp


@pytest.mark.parametrize("case", CASES)
def test_a_tiny_run_of_each_case(case):
    for comparison in CASES[case](tiny=True):
        record = run.measure(comparison, repeats=2)
        assert set(record["median_s"]) == set(record["speed_up"]) == set(comparison.contenders)


def test_contenders_that_do_other_work_are_found_out():
    (comparison,) = CASES["components"](tiny=True)
    results = {name: work() for name, work in comparison.contenders.items()}
    comparison.check(results)
    labels, table = results["gpuroi"]
    results["gpuroi"] = (np.roll(labels, 1), table)
    with pytest.raises(AssertionError):
        comparison.check(results)


def test_a_record_names_its_circumstances_and_the_report_reads_it(tmp_path):
    (comparison,) = CASES["components"](tiny=True)
    record = run.measure(comparison, repeats=1) | run.circumstances()
    results = tmp_path / "components.jsonl"
    results.write_text(json.dumps(record) + "\n")
    assert {"gpuroi", "numpy", "scipy"} <= set(record["versions"])
    table = report.table(report.latest(results))
    assert "| gpuroi |" in table
    assert record["processor"] in table


def test_readme_shows_the_recorded_figures():
    assert report.render(report.README.read_text()) == report.README.read_text()


@pytest.fixture(autouse=True)
def shortly_and_without_cucim(monkeypatch):
    monkeypatch.setattr(gpu, "MOST_REPEATS", 2)
    monkeypatch.setitem(sys.modules, "cucim.skimage.measure", None)


def rehearsal(own=None, **changes):
    """Return NumPy in the place of a GPU; `own` takes the place of the kernels."""
    peers, missing = gpu.find_peers(lambda mask: ndimage.label(mask)[0])
    backends = {
        gpu.CPU: CpuBackend(),
        gpu.OWN: own or library_on_cpu(),
        gpu.CUPY: library_on_cpu(),
    }
    device = gpu.Device(np, ndimage, backends, peers, missing, gpu.wall_clock, lambda: None)
    return replace(device, **changes)


def dress_rehearsal():
    """Return the kernels as C++, and arrays that refuse what CuPy's refuse."""

    def smoothed(array, size, mode):
        return xp.asarray(ndimage.uniform_filter(array.get(), size, mode=mode))

    peers, missing = gpu.find_peers(lambda mask: filters.label(mask, None)[0])
    backends = {
        gpu.CPU: CpuBackend(),
        gpu.OWN: on_cpu(KernelVerbs(xp, unpacking(Fibers()), THREADS, ITEMS), xp),
        gpu.CUPY: on_cpu(LibraryVerbs(xp, filters), xp),
    }
    library = types.SimpleNamespace(uniform_filter=smoothed)
    return gpu.Device(xp, library, backends, peers, missing, gpu.wall_clock, lambda: None)


def rehearse(device, tmp_path, *options):
    """Return the exit status of a run on tiny maps without the suite, and its lines."""
    output = tmp_path / "gpu.jsonl"
    arguments = ["--quick", "--no-suite", "--output", str(output), *options]
    status = gpu.main(arguments, lambda: device)
    return status, [json.loads(line) for line in output.read_text().splitlines()]


def one_run(tmp_path, device=None, seconds=60):
    ends_at = time.monotonic() + seconds
    return gpu.Run(device or rehearsal(), tmp_path / "gpu.jsonl", ends_at, {})


class Altered:
    """A backend with something between a verb and its caller."""

    def __init__(self, verb, alter):
        self._backend, self._verb, self._alter = library_on_cpu(), verb, alter

    def __getattr__(self, name):
        work = getattr(self._backend, name)
        if name != self._verb:
            return work
        return lambda maps, *arguments: self._alter(maps, work(maps, *arguments))


def wrong_in(volume):
    """Return what changes one number of what a verb says of one volume."""

    def alter(maps, result):
        if isinstance(result, list):
            last = result[volume]
            label = np.where(np.arange(last.label.size) == 3, 77, last.label).astype(np.int32)
            result[volume] = LabelledVoxels(last.index, label, last.n_regions)
            return result
        array = result[0] if isinstance(result, tuple) else result
        array[volume].ravel()[1:2].view(np.int32)[:] += 1
        return result

    return alter


class TestCudaRun:
    @needs_compiler
    def test_every_stage_of_every_case_with_the_kernels(self, tmp_path, capsys):
        status, lines = rehearse(dress_rehearsal(), tmp_path)
        assert status == 0
        assert not [line for line in lines if "failed" in line]
        for case in gpu.CASES:
            names = {line["stage"] for line in lines if line["case"] == case.name}
            assert names == ({"isal"} if case.name == gpu.FILES else {*case.stages, "labels"})
        timed = [line for line in lines if line["stage"] in gpu.STAGES]
        assert {line["contender"] for line in timed} == {gpu.CPU, gpu.OWN, gpu.CUPY}
        for line in timed:
            assert line["median_s"] > 0
            assert line["repeats"] >= 1
            assert line["maps_per_s"] == pytest.approx(line["timed_maps"] / line["median_s"])
            is_cpu = line["contender"] == gpu.CPU
            assert line.get("identical") is (None if is_cpu else True)
            assert line["compared_maps"] == (0 if is_cpu else line["maps"])
            assert ("share_of_copy" in line) is not is_cpu
            if not is_cpu:
                n_bytes = np.prod(line["shape"]) * line["bytes_per_voxel"] * line["maps_per_s"]
                assert line["share_of_copy"] == pytest.approx(n_bytes / lines[0]["bytes_per_s"])
        ends = {line["contender"]: line for line in lines if line["case"] == gpu.FILES}
        assert ends[gpu.DOOR]["identical"]
        assert ends[gpu.BY_HAND]["identical"]
        for line in lines:
            assert {"date", "commit", "device", "processor", "cores", "versions"} <= set(line)
            assert {"numpy", "scipy"} <= set(line["versions"])
            assert line["quick"]
        assert str(tmp_path) not in (tmp_path / "gpu.jsonl").read_text()
        table = capsys.readouterr().out.partition(gpu.HEADING)[2].splitlines()
        assert len(table) < 110
        assert any(line.startswith("kept") and "comparisons" in line for line in table)

    def test_maps_differ_and_have_regions_to_compare(self):
        case = replace(gpu.CASES[0], n_maps=9, shape=(11, 12, 13), voxel_mm=4.0)
        batch = gpu.make_batch(rehearsal(), case)
        assert len(np.unique(batch.maps.reshape(9, -1), axis=0)) == 9
        assert (batch.maps == 0).mean() > 0.5
        _, counts = CpuBackend().components(batch.maps, batch.cutoffs, "both", 6, 4)
        assert (counts > 0).all()
        foreground = np.abs(batch.maps) >= batch.cutoffs.reshape(-1, 1, 1, 1)
        np.testing.assert_allclose(foreground.mean(axis=(1, 2, 3)), 0.03, atol=1e-3)
        sorted_maps = np.sort(np.abs(batch.maps.reshape(9, -1)))
        at_ranks = np.take_along_axis(sorted_maps, batch.ranks, axis=1)
        assert (at_ranks[:, 0] < batch.cutoffs).all()
        assert (batch.cutoffs <= np.nextafter(at_ranks[:, 1], np.inf, dtype=np.float32)).all()
        assert gpu.SEED_FLOOR == local_regions.SEED_FLOOR
        assert gpu.SEED_DISTANCE_VOXELS == local_regions.SEED_DISTANCE_VOXELS

    @pytest.mark.parametrize("verb", gpu.STAGES)
    def test_one_wrong_number_is_found_out(self, verb, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(gpu, "CPU_MAPS", 1)  # which is the last map
        for volume, witness in ((0, gpu.CUPY), (2, gpu.OWN)):
            device = rehearsal(Altered(verb, wrong_in(volume)))
            status, lines = rehearse(device, tmp_path, "--only", "2mm-1000")
            assert status == 1
            found = {
                (line["contender"], *line["differing_maps"])
                for line in lines
                if line["stage"] == verb and line.get("identical") is False
            }
            assert (witness, volume) in found
            out = capsys.readouterr().out
            assert f"{verb}, identical in all cases" in out
            assert "NOT KEPT     identical in" in out
            (tmp_path / "gpu.jsonl").unlink()

    def test_what_does_not_fit_goes_in_pieces_or_is_skipped(self, tmp_path):
        def too_large(at_most):
            def alter(maps, result):
                if len(maps) > at_most:
                    raise MemoryError
                return result

            return rehearsal(Altered("components", alter))

        def measured(device):
            status, lines = rehearse(device, tmp_path, "--only", "2mm-256")
            assert status == 0
            return next(
                one
                for one in reversed(lines)
                if (one["stage"], one["contender"]) == ("components", gpu.OWN)
            )

        line = measured(too_large(2))
        assert (line["pieces"], line["compared_maps"], line["identical"]) == (2, 3, True)
        assert measured(too_large(1))["pieces"] == 3
        assert measured(too_large(0))["skipped"] == "out of memory"

    def test_a_failure_is_recorded_and_silences_nobody(self, tmp_path):
        def alter(maps, result):
            raise RuntimeError("cannot open /home/somebody/kernel.cu: illegal address")

        device = rehearsal(Altered("local_maxima", alter))
        status, lines = rehearse(device, tmp_path, "--only", "2mm-1000", "--only", "2mm-1")
        assert status == 1
        (failed,) = [line for line in lines if "failed" in line]
        assert failed["failed"] == "RuntimeError: cannot open <path>: illegal address"
        assert any(line["case"] == "2mm-1" and line.get("identical") for line in lines)

    def test_nothing_is_begun_that_the_time_does_not_suffice_for(self, tmp_path, capsys):
        status, lines = rehearse(rehearsal(), tmp_path, "--budget-s", "1")
        assert status == 0
        assert {line["case"] for line in lines} == {"copy", *(case.name for case in gpu.CASES)}
        assert all(line["skipped"].startswith("0 s left") for line in lines)
        assert "not measured identical in 0 of 0 comparisons" in capsys.readouterr().out
        begun = []
        short = one_run(tmp_path, seconds=gpu.STAGE_NEEDS_S + 10)
        for needs_s in (gpu.STAGE_NEEDS_S, gpu.STAGE_NEEDS_S + 60):
            short.attempt(lambda: begun.append(1), needs_s, case="a", stage="b", contender="c")
        assert len(begun) == 1
        assert "needed" in short.records[-1]["skipped"]

    def test_missing_peers_are_named(self, tmp_path, monkeypatch, capsys):
        for name in ("cucim", "isal", "nibabel", "threadpoolctl"):
            monkeypatch.setitem(sys.modules, name, None)
        device = rehearsal()
        assert {"cucim", "isal", "nibabel", "threadpoolctl"} <= set(device.missing)
        status, lines = rehearse(device, tmp_path, "--only", "2mm-1", "--only", gpu.FILES)
        assert status == 0
        skipped = {line["contender"]: line["skipped"] for line in lines if "skipped" in line}
        assert skipped[gpu.DOOR] == "nibabel, isal, threadpoolctl missing"
        assert "cucim" in skipped[gpu.CUCIM_SINGLY]
        ends = {line["contender"]: line for line in lines if line["stage"] == "zlib"}
        assert ends[gpu.BY_HAND]["identical"]
        assert "MISSING isal: not installed" in capsys.readouterr().out

    @pytest.mark.parametrize("is_right", [True, False])
    def test_cucim_is_compared_where_there_is_one(self, is_right, tmp_path, monkeypatch):
        def label(mask, connectivity):
            assert connectivity == 1
            return ndimage.label(mask)[0] * (1 if is_right else 2)

        measure = types.SimpleNamespace(label=label)
        monkeypatch.setitem(sys.modules, "cucim.skimage.measure", measure)
        status, lines = rehearse(rehearsal(), tmp_path, "--only", "2mm-16")
        (line,) = [line for line in lines if line["contender"] == gpu.CUCIM_SINGLY]
        assert line["identical"] is is_right
        assert status == int(not is_right)

    def test_promises_are_judged_by_what_was_measured(self, tmp_path):
        of_first = {"case": gpu.CASES[0].name, "maps": 1000, "timed_maps": 1000, "median_s": 1.0}
        files = of_first | {"case": gpu.FILES, "stage": "isal"}

        def judged(own, share, door, is_identical=True):
            run = one_run(tmp_path)
            for stage, contender, rate in (
                ("components", gpu.OWN, own),
                ("components", gpu.CPU, 100),
                ("components", gpu.CUPY, 5000),
                ("labels", gpu.CUCIM_SINGLY, 3000),
            ):
                more = {"maps_per_s": rate, "share_of_copy": share}
                more |= {"compared_maps": 1, "identical": is_identical}
                run.add(**of_first, **more, stage=stage, contender=contender)
            run.add(**files, contender="decoder x16", maps_per_s=1000)
            run.add(**files, contender=gpu.BY_HAND, maps_per_s=1)
            run.add(**files, contender=gpu.DOOR, maps_per_s=door)
            run.add(case="suite", stage=gpu.REQUIRED, contender=gpu.OWN, tests={"passed": 3})
            found = dict(gpu.promises(run, 470, 480))
            return {
                text.partition(" >=")[0].partition(":")[2]: kept for text, kept in found.items()
            }

        good, bad = judged(60_000, 0.5, 900), judged(49_000, 0.49, 899)
        for text in (
            " components, share of 24 B/voxel at copy bandwidth",
            f" components, times {gpu.CUCIM_SINGLY}",
            f" components, times {gpu.CPU} on one core",
            f" {gpu.DOOR}, share of decoder x16",
        ):
            assert good[text] is True, text
            assert bad[text] is False, text
        assert good[f" components, times {gpu.CUPY_SINGLY}"] is None
        differing = judged(60_000, 0.5, 900, is_identical=False)
        proven = f" components, identical in all cases, times {gpu.CUPY}"
        assert good[proven] is True
        assert differing[proven] is False
        assert good[" 1 of 1 passed"] is True

    def test_volumes_of_a_sample_are_spread_and_end_with_the_last(self):
        assert list(gpu.every_nth(1000, 8)) == list(range(124, 1000, 125))
        assert list(gpu.every_nth(10, 8)) == [1, 3, 5, 7, 9]
        assert list(gpu.every_nth(1, 8)) == [0]

    def test_files_are_nifti_images(self, tmp_path):
        volume = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
        path = tmp_path / "map.nii"
        path.write_bytes(gpu.nifti_header(volume.shape, 2.0) + volume.tobytes(order="F"))
        img = nib.load(path)
        np.testing.assert_array_equal(np.asanyarray(img.dataobj), volume, strict=True)
        np.testing.assert_array_equal(img.affine, np.diag([2.0, 2, 2, 1]))

    def test_without_cuda_it_says_why_in_one_line(self, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "cupy", None)
        assert gpu.main([]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("no CUDA run: CuPy cannot be imported")
        assert captured.err.count("\n") == 1

        def faulty():
            raise BackendUnavailableError("two\nlines")

        assert gpu.main([], faulty) == 2
        assert capsys.readouterr().err == "no CUDA run: two lines\n"

    def test_it_starts_with_numpy_and_scipy_alone(self):
        absent = [*gpu._OPTIONAL, "cvxopt", "cupy", "cucim"]
        code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import benchmarks.gpu"
        root = Path(__file__).parents[1]
        subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


class TestSuiteOfTheCudaRun:
    @pytest.fixture
    def suite(self, tmp_path):
        """Return a function that runs a file of tests as the suite, and gives the records."""

        def run_file(code, missing=(), needed=(), seconds=60):
            file = tmp_path / "test_it.py"
            file.write_text(code)
            device = rehearsal(missing=dict.fromkeys(missing, "not installed"))
            run = one_run(tmp_path, device, seconds)
            gpu.run_suite(run, {str(file): needed})
            return {record["contender"]: record for record in run.records}

        return run_file

    def test_it_requires_cuda_once_with_each_kind_of_kernels(self, suite):
        code = (
            "import os\n"
            "def test_required(): assert os.environ['GPUROI_REQUIRE'] == 'cuda'\n"
            "def test_own(): assert os.environ['GPUROI_CUDA_KERNELS'] == 'own'\n"
        )
        found = suite(code)
        assert found[gpu.OWN]["tests"] == {"passed": 2}
        assert "failed" not in found[gpu.OWN]
        assert found[gpu.CUPY]["tests"] == {"failed": 1, "passed": 1}
        assert "test_own" in found[gpu.CUPY]["failed"]

    def test_it_does_not_pass_by_skipping_or_running_out_of_time(self, suite):
        skipping = "import pytest\ndef test_it(): pytest.skip('no device')\n"
        assert all("failed" in record for record in suite(skipping).values())
        waiting = "import time\ndef test_it(): time.sleep(60)\n"
        assert suite(waiting, seconds=3)[gpu.OWN]["failed"] == "not done after 1 s"

    def test_what_is_missing_is_named(self, suite):
        assert suite("", missing=["pytest"])["-"]["skipped"] == "pytest is missing"
        left_out = suite("", missing=["nilearn", "cucim"], needed=["nilearn"])
        assert left_out["-"]["skipped"] == "nilearn missing"
        assert list(left_out) == ["-"]  # without a file pytest would run them all

    def test_its_files_need_what_they_import(self):
        root = Path(__file__).parents[1]
        for file, needed in gpu.SUITE.items():
            code = (root / file).read_text()
            imported = set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))
            others = imported - set(sys.stdlib_module_names) - {"gpuroi", "tests"}
            assert others - {"numpy", "scipy", "pytest"} <= set(needed), file
            assert "nilearn" in needed or "tests.conftest" not in code
        assert gpu._CUCIM_TEST.partition("::")[2] in (root / "tests/test_backends.py").read_text()

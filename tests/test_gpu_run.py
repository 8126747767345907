"""The run on a GPU, rehearsed without one: every part, what it finds out, and what it survives."""

import json
import os
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

from benchmarks.gpu import command, files, kernels, records, stages, suite, work
from benchmarks.gpu.device import (
    CPU,
    CUCIM_SINGLY,
    CUPY,
    CUPY_SINGLY,
    OPTIONAL,
    OWN,
    Device,
    find_peers,
    wall_clock,
)
from benchmarks.gpu.records import Run
from benchmarks.gpu.verdict import HEADING, promises, proofs
from benchmarks.gpu.work import BY_HAND, CASES, COHORT, DOOR, FILES, REQUIRED, SUITE, VERB_STAGES
from gpuroi.algorithms import local_regions
from gpuroi.backends import LabelledVoxels, cuda
from gpuroi.backends._kernels import KernelVerbs
from gpuroi.backends._library import LibraryVerbs
from gpuroi.backends.cpu import CpuBackend
from gpuroi.errors import BackendUnavailableError
from tests.cuda_on_cpu import ITEMS, THREADS, library_on_cpu, needs_compiler, on_cpu
from tests.cuda_on_cpu.compiler import Fibers
from tests.cuda_on_cpu.device_array import filters, unpacking, xp

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def shortly_and_without_cucim(monkeypatch):
    monkeypatch.setattr(records, "MOST_REPEATS", 2)
    monkeypatch.setattr(kernels, "BLOCKS", ((THREADS, 2 * ITEMS),))
    monkeypatch.setitem(sys.modules, "cucim.skimage.measure", None)


def rehearsal(own=None, **changes):
    """Return NumPy in the place of a GPU; `own` takes the place of the kernels."""
    peers, missing = find_peers(lambda mask: ndimage.label(mask)[0])
    backends = {CPU: CpuBackend(), OWN: own or library_on_cpu(), CUPY: library_on_cpu()}
    device = Device(np, ndimage, backends, peers, missing, wall_clock, lambda: None, name="cpu")
    return replace(device, **changes)


def dress_rehearsal():
    """Return the kernels as C++, and arrays that refuse what CuPy's refuse."""

    def smoothed(array, size, mode):
        return xp.asarray(ndimage.uniform_filter(array.get(), size, mode=mode))

    compiler = unpacking(Fibers())
    return rehearsal(
        xp=xp,
        ndimage=types.SimpleNamespace(uniform_filter=smoothed),
        backends={
            CPU: CpuBackend(),
            OWN: on_cpu(KernelVerbs(xp, compiler, THREADS, ITEMS), xp),
            CUPY: on_cpu(LibraryVerbs(xp, filters), xp),
        },
        peers={CUPY_SINGLY: lambda mask: filters.label(mask, None)[0]},
        compiler=compiler,
        kernels=lambda xp, compiler, threads=THREADS, items=ITEMS: KernelVerbs(
            xp, compiler, threads, items
        ),
    )


def rehearse(device, tmp_path, *options):
    """Return the exit status of a run on tiny maps without the suite, and its lines."""
    output = tmp_path / "new" / "gpu.jsonl"

    def here(part, options, limit_s):
        return command.measure(part, options, limit_s, lambda: device)

    arguments = ["--quick", "--no-suite", "--output", str(output), *options]
    status = command.main(arguments, here)
    return status, [json.loads(line) for line in output.read_text().splitlines()]


def one_run(tmp_path, device=None, seconds=60):
    return Run(
        device=device or rehearsal(),
        output=tmp_path / "gpu.jsonl",
        ends_at=time.monotonic() + seconds,
        circumstances={},
    )


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
        for case in CASES:
            names = {line["stage"] for line in lines if line["case"] == case.name}
            of_maps = {*case.stages, "labels", "copy"}
            assert names == ({"isal"} if case.name == FILES else of_maps)
        copies = [line for line in lines if line["stage"] == "copy"]
        timed = [line for line in lines if "bytes_per_voxel" in line]
        tried = f"own, {THREADS} x {2 * ITEMS}"
        assert {line["contender"] for line in timed} == {CPU, OWN, CUPY, tried}
        for line in timed:
            assert line["median_s"] > 0
            assert line["repeats"] >= 1
            assert line["maps_per_s"] == pytest.approx(line["timed_maps"] / line["median_s"])
            is_cpu = line["contender"] == CPU
            assert line.get("identical") is (None if is_cpu else True)
            assert line["compared_maps"] == (0 if is_cpu else line["maps"])
            assert ("share_of_copy" in line) is not is_cpu
            if not is_cpu:
                n_bytes = np.prod(line["shape"]) * line["bytes_per_voxel"] * line["maps_per_s"]
                copy = next(one for one in copies if one["case"] == line["case"])
                assert line["share_of_copy"] == pytest.approx(n_bytes / copy["bytes_per_s"])
        ends = {line["contender"]: line for line in lines if line["case"] == FILES}
        for way in (BY_HAND, DOOR, COHORT):
            assert ends[way]["identical"]
            assert ends[way]["timed_maps"] == 3 * files.TIMES
        for line in lines:
            assert {"date", "commit", "device", "processor", "cores", "versions"} <= set(line)
            assert line["run"] == lines[0]["run"]
            assert {"numpy", "scipy"} <= set(line["versions"])
            assert line["quick"]
        assert not any(str(tmp_path) in json.dumps(line) for line in lines)
        table = capsys.readouterr().out.partition(HEADING)[2].splitlines()
        assert len(table) < 150
        assert any(line.startswith("kept") and "comparisons" in line for line in table)

    @needs_compiler
    def test_every_kernel_is_timed_in_the_first_case(self, tmp_path):
        _, lines = rehearse(dress_rehearsal(), tmp_path, "--only", "2mm-1000", "--only", "2mm-1")
        alone = [line for line in lines if line["contender"].startswith("  ")]
        assert {line["case"] for line in alone} == {"2mm-1000"}
        launches = {(one["stage"], one["contender"].strip()): one["launches"] for one in alone}
        sources = (ROOT / "gpuroi" / "backends" / "kernels").glob("*.cu")
        defined = {
            name
            for source in sources
            for name in re.findall(r"__global__ void (\w+)\(", source.read_text())
        }
        assert {name for _, name in launches} == defined
        assert launches["order_statistics", "count_digits"] == 3  # reads of float32
        assert launches["smooth", "smooth_axis"] == 3
        assert launches["components", "merge"] == 1
        assert all(line["median_s"] > 0 and "identical" not in line for line in alone)

    def test_maps_differ_and_have_regions_to_compare(self):
        case = replace(CASES[0], n_maps=9, shape=(11, 12, 13), voxel_mm=4.0)
        batch = work.make_batch(rehearsal(), case)
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
        assert work.SEED_FLOOR == local_regions.SEED_FLOOR
        assert work.SEED_DISTANCE_VOXELS == local_regions.SEED_DISTANCE_VOXELS

    @pytest.mark.parametrize("verb", stages.VERBS)
    def test_one_wrong_number_is_found_out(self, verb, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(stages, "CPU_MAPS", 1)  # which is the last map
        for volume, witness in ((0, CUPY), (2, OWN)):
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
            (chosen,) = (name for name, timed in VERB_STAGES.items() if verb in timed)
            assert f"NOT KEPT     {chosen}: identical and faster than {CUPY} in " in out
            assert "NOT KEPT     identical in" in out
            (tmp_path / "new" / "gpu.jsonl").unlink()

    def test_what_does_not_fit_goes_in_pieces_or_is_skipped(self, tmp_path):
        def measured(at_most, contender=OWN):
            def alter(maps, result):
                if len(maps) > at_most:
                    raise MemoryError
                return result

            device = rehearsal()
            device.backends[contender] = Altered("components", alter)
            status, lines = rehearse(device, tmp_path, "--only", "2mm-256")
            asked = ("components", contender)
            found = [one for one in lines if (one["stage"], one["contender"]) == asked]
            return status, found[-1]

        status, line = measured(at_most=2)
        assert status == 0
        assert (line["pieces"], line["compared_maps"], line["identical"]) == (2, 3, True)
        assert measured(at_most=1)[1]["pieces"] == 3
        status, line = measured(at_most=0, contender=CUPY)
        assert (status, line["skipped"]) == (0, "out of memory")
        status, line = measured(at_most=0)  # though the batch could be made, which takes more
        assert (status, line["failed"]) == (1, "out of memory")

    def test_a_failure_is_recorded_and_silences_nobody(self, tmp_path):
        def alter(maps, result):
            raise RuntimeError("cannot open /home/somebody/kernel.cu: illegal address")

        device = rehearsal(Altered("local_maxima", alter))
        status, lines = rehearse(device, tmp_path, "--only", "2mm-1000", "--only", "2mm-1")
        assert status == 1
        (failed,) = [line for line in lines if "failed" in line]
        assert failed["failed"] == "RuntimeError: cannot open <path>: illegal address"
        assert any(line["case"] == "2mm-1" and line.get("identical") for line in lines)

    @pytest.mark.parametrize(("name", "lost"), [("smooth", "smooth"), ("components", "components")])
    def test_kernels_that_fail_lose_only_their_own_figures(self, name, lost, tmp_path):
        def alter(maps, result):
            raise RuntimeError("illegal address")

        measure = types.SimpleNamespace(label=lambda mask, connectivity: ndimage.label(mask)[0])
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "cucim.skimage.measure", measure)
            device = rehearsal(Altered(name, alter))
        _, lines = rehearse(device, tmp_path, "--only", "2mm-1000")
        failed = {(line["stage"], line["contender"]) for line in lines if "failed" in line}
        assert failed == {(lost, OWN)}
        same = {(one["stage"], one["contender"]) for one in lines if one.get("identical")}
        assert {(stage, CUPY) for stage in work.STAGES} <= same
        assert {("local_maxima", OWN), ("labels", CUCIM_SINGLY), ("labels", CUPY_SINGLY)} <= same

    def test_without_the_copy_there_are_no_shares_but_promises(self, tmp_path, monkeypatch, capsys):
        def fails(run, n_bytes):
            raise RuntimeError("no")

        monkeypatch.setattr("benchmarks.gpu.case.measure_copy", fails)
        status, lines = rehearse(rehearsal(), tmp_path, "--only", "2mm-1000")
        assert status == 1
        assert not [line for line in lines if "share_of_copy" in line]
        out = capsys.readouterr().out
        assert "not measured 2mm-1000: components, share of 24 B/voxel" in out
        assert f"2mm-1000: components, times {CUPY_SINGLY} >= 20:" in out

    def test_nothing_is_begun_that_the_time_does_not_suffice_for(self, tmp_path, capsys):
        status, lines = rehearse(rehearsal(), tmp_path, "--budget-s", "1")
        assert status == 0
        assert {line["case"] for line in lines} == {case.name for case in CASES}
        assert all(line["skipped"].startswith("0 s left") for line in lines)
        out = capsys.readouterr().out
        assert "not measured identical in 0 of 0 comparisons" in out
        assert f"not measured components: identical and faster than {CUPY} in 0 of 9 cases" in out
        begun = []
        short = one_run(tmp_path, seconds=work.STAGE_NEEDS_S + 10)
        for needs_s in (work.STAGE_NEEDS_S, work.STAGE_NEEDS_S + 60):
            short.attempt(lambda: begun.append(1), needs_s, case="a", stage="b", contender="c")
        assert len(begun) == 1
        assert "needed" in short.records[-1]["skipped"]

    def test_missing_peers_are_named(self, tmp_path, monkeypatch, capsys):
        for name in ("cucim", "isal", "nibabel", "threadpoolctl", "filelock"):
            monkeypatch.setitem(sys.modules, name, None)
        device = rehearsal()
        assert {"cucim", "isal", "nibabel", "threadpoolctl", "filelock"} <= set(device.missing)
        status, lines = rehearse(device, tmp_path, "--only", "2mm-1", "--only", FILES)
        assert status == 0
        skipped = {line["contender"]: line["skipped"] for line in lines if "skipped" in line}
        assert skipped[DOOR] == "nibabel, isal, threadpoolctl missing"
        assert skipped[COHORT] == "nibabel, isal, threadpoolctl, filelock missing"
        assert "cucim" in skipped[CUCIM_SINGLY]
        ends = {line["contender"]: line for line in lines if line["stage"] == "zlib"}
        assert ends[BY_HAND]["identical"]
        assert "MISSING isal: not installed" in capsys.readouterr().out

    @pytest.mark.parametrize("is_right", [True, False])
    def test_cucim_is_compared_where_there_is_one(self, is_right, tmp_path, monkeypatch):
        def label(mask, connectivity):
            assert connectivity == 1
            return ndimage.label(mask)[0] * (1 if is_right else 2)

        measure = types.SimpleNamespace(label=label)
        monkeypatch.setitem(sys.modules, "cucim.skimage.measure", measure)
        status, lines = rehearse(rehearsal(), tmp_path, "--only", "2mm-16")
        (line,) = [line for line in lines if line["contender"] == CUCIM_SINGLY]
        assert line["identical"] is is_right
        assert status == int(not is_right)

    def test_promises_are_judged_by_what_was_measured(self, tmp_path):
        of_first = {"case": CASES[0].name, "maps": 1000, "timed_maps": 1000, "median_s": 1.0}
        of_files = of_first | {"case": FILES, "stage": "isal"}

        def judged(own, share, end, is_identical=True):
            run = one_run(tmp_path)
            for stage, contender, rate in (
                ("components", OWN, own),
                ("components", CPU, 100),
                ("components", CUPY, 5000),
                ("labels", CUCIM_SINGLY, 3000),
            ):
                more = {"maps_per_s": rate, "share_of_copy": share}
                more |= {"compared_maps": 1, "identical": is_identical}
                run.add(**of_first, **more, stage=stage, contender=contender)
            run.add(**of_files, contender="decoder x1", maps_per_s=100)
            run.add(**of_files, contender="decoder x16", maps_per_s=1000)
            for way in (BY_HAND, DOOR, COHORT):
                run.add(**of_files, contender=way, maps_per_s=end)
            run.add(case=SUITE, stage=REQUIRED, contender=OWN, tests={"passed": 3})
            found = dict(promises(run.records, 470, 480))
            return {
                re.split(r" >=|: \d+[.]\d\d$", text)[0].partition(":")[2]: verdict
                for text, verdict in found.items()
            }

        good, bad = judged(60_000, 0.5, 900), judged(49_000, 0.49, 899)
        for text in (
            " components, share of 24 B/voxel at copy bandwidth",
            f" components, times {CUCIM_SINGLY}",
            f" components, times {CPU} on one core",
            f" {BY_HAND}, share of decoder x16",
            f" {DOOR}, share of decoder x16",
        ):
            assert good[text] == "kept", text
            assert bad[text] == "NOT KEPT", text
        assert good[f" components, times {CUPY_SINGLY}"] == "not measured"
        cohort = f" {COHORT}, which writes three files a map, share of decoder x16"
        assert good[cohort] == bad[cohort] == "reported"
        assert good[" 1 of 1 passed"] == "kept"

    def test_what_failed_or_hung_has_kept_no_promise(self, tmp_path):
        def not_kept(**lost):
            found = promises([lost | {"failed": "hung"}], 470, 480)
            return {text.partition(" >=")[0] for text, verdict in found if verdict == "NOT KEPT"}

        first = CASES[0].name
        compared = "identical in 0 of 1 comparisons"
        of_components = {
            compared,
            f"{first}: components, share of 24 B/voxel at copy bandwidth",
            *(f"{first}: components, times {name}" for name in (CUCIM_SINGLY, CUPY_SINGLY)),
            f"{first}: components, times {CPU} on one core",
            f"components: identical and faster than {CUPY} in 0 of 9 cases",
        }
        others = {
            f"{verb}: identical and faster than {CUPY} in 0 of {n} cases"
            for verb, n in (("order_statistics", 7), ("smooth", 2), ("local_maxima", 2))
        }
        assert not_kept(case=first, stage="components", contender=OWN) == of_components
        assert not_kept(case=first, stage="-", contender="-") == of_components | others
        ends = {name: f"{FILES}: {name}, share of decoder" for name in (BY_HAND, DOOR)}
        assert not_kept(case=FILES, stage="isal", contender=DOOR) == {compared, ends[DOOR]}
        assert not_kept(case=FILES, stage="-", contender="-") == {compared, *ends.values()}
        assert not_kept(case=SUITE, stage="-", contender="-") == {"contract suite: 0 of 1 passed"}

    def test_volumes_of_a_sample_are_spread_and_end_with_the_last(self):
        assert list(work.every_nth(1000, 8)) == list(range(124, 1000, 125))
        assert list(work.every_nth(10, 8)) == [1, 3, 5, 7, 9]
        assert list(work.every_nth(1, 8)) == [0]

    def test_files_are_nifti_images(self, tmp_path):
        volume = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
        path = tmp_path / "map.nii"
        path.write_bytes(files.nifti_header(volume.shape, 2.0) + volume.tobytes(order="F"))
        img = nib.load(path)
        np.testing.assert_array_equal(np.asanyarray(img.dataobj), volume, strict=True)
        np.testing.assert_array_equal(img.affine, np.diag([2.0, 2, 2, 1]))

    def test_without_cuda_it_says_why_in_one_line(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "cupy", None)
        output = ["--output", str(tmp_path / "gpu.jsonl")]
        assert command.main(["--part", "2mm-1", *output]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("no CUDA run: CuPy cannot be imported")
        assert captured.err.count("\n") == 1

        def faulty():
            raise BackendUnavailableError("two\nlines")

        def here(part, options, limit_s):
            return command.measure(part, options, limit_s, faulty)

        assert command.main(output, here) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err == "no CUDA run: two lines\n"
        assert not (tmp_path / "gpu.jsonl").exists()

    def test_it_starts_with_numpy_and_scipy_alone(self):
        absent = [*OPTIONAL, "cvxopt", "cupy", "cucim"]
        code = f"import sys; sys.modules.update(dict.fromkeys({absent})); "
        code += "import benchmarks.gpu.__main__"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

    def test_what_is_recorded_of_the_code(self, tmp_path, monkeypatch):
        assert isinstance(records.of_host(None, False)["uncommitted_changes"], bool | None)
        monkeypatch.setattr(records, "ROOT", tmp_path)  # which is no repository
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        found = records.of_host("abc1234", False)
        assert (found["commit"], found["uncommitted_changes"]) == ("abc1234", None)


def whole_run(name="0a1b2c3d"):
    """Return the records of a run that proves the kernels of every verb."""
    of_run = {"run": name, "quick": False, "versions": {"cuda-driver": "13000"}}
    records = [
        of_run | {"case": SUITE, "stage": REQUIRED, "contender": OWN, "tests": {"passed": 9}}
    ]
    for case in CASES:
        for stage in case.stages:
            where = of_run | {"case": case.name, "stage": stage, "median_s": 1.0}
            records.append(where | {"contender": CPU, "maps_per_s": 1.0})
            for contender, maps_per_s in ((OWN, 30.0), (CUPY, 20.0)):
                measured = {"contender": contender, "maps_per_s": maps_per_s, "identical": True}
                records.append(where | measured)
    return records


class TestProofs:
    """The kernels of a verb become its default by one whole run, in every case of it."""

    def test_a_run_that_shows_it_in_every_case(self):
        for verb in VERB_STAGES:
            assert proofs(whole_run("one") + whole_run("other"), verb) == ["one", "other"]
            assert proofs([], verb) == []
        assert set(VERB_STAGES) == set(cuda.VERBS)

    @pytest.mark.parametrize("case", ["2mm-1000", "2mm-1"])
    @pytest.mark.parametrize(
        ("contender", "outcome"),
        [
            (OWN, {"identical": False}),
            (OWN, {"maps_per_s": 20.0}),
            (OWN, {"identical": None}),  # nobody to compare with
            (CUPY, {"identical": False}),
            (CUPY, {"maps_per_s": 30.0}),
        ],
    )
    def test_no_case_makes_up_for_another(self, case, contender, outcome):
        records = whole_run()
        for one in records:
            if (one["case"], one["stage"], one["contender"]) == (case, "components", contender):
                one |= outcome
        assert proofs(records, "components") == []
        assert proofs(records, "order_statistics") == ["0a1b2c3d"]
        assert proofs(whole_run("other") + records, "components") == ["other"]

    @pytest.mark.parametrize("outcome", ["failed", "skipped", "absent"])
    @pytest.mark.parametrize(("stage", "contender"), [("components", OWN), ("components", CUPY)])
    def test_what_was_not_measured_shows_nothing(self, outcome, stage, contender):
        records = whole_run()
        (lost,) = (
            one
            for one in records
            if (one["case"], one["stage"], one["contender"]) == ("1mm-1", stage, contender)
        )
        records.remove(lost)
        if outcome != "absent":
            names = ("run", "quick", "versions", "case", "stage", "contender")
            records.append({name: lost[name] for name in names} | {outcome: "why"})
        assert proofs(records, "components") == []
        assert proofs(records, "order_statistics") == ["0a1b2c3d"]

    def test_the_stages_of_a_verb_are_one(self):
        records = [one for one in whole_run() if one["stage"] != "component_voxels"]
        assert proofs(records, "components") == []

    def test_a_part_that_hung_shows_nothing(self):
        hung = whole_run()[0] | {"case": "2mm-1", "stage": "-", "contender": "-", "failed": "hung"}
        assert proofs([*whole_run(), hung | {"versions": None}], "components") == []
        assert proofs([*whole_run(), hung], "smooth") == ["0a1b2c3d"]  # which that part has not

    def test_two_halves_are_no_whole(self):
        first, second = whole_run("first"), whole_run("second")
        half = len(first) // 2
        assert proofs(first[:half] + second[half:], "components") == []

    def test_only_a_gpu_with_whole_maps_and_the_suite_counts(self):
        for other in ({"versions": {"numpy": "2"}}, {"quick": True}):
            assert proofs([one | other for one in whole_run()], "smooth") == []
        suite, *others = whole_run()
        assert proofs(others, "smooth") == []
        assert proofs([suite | {"failed": "test_it"}, *others], "smooth") == []
        assert proofs([suite | {"contender": CUPY}, *others], "smooth") == []

    def test_the_page_says_what_is_the_default_and_which_run_proves_it(self):
        page = (ROOT / "docs" / "cuda.md").read_text()
        rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.+) \|$", page, re.MULTILINE)
        assert [verb for verb, _, _ in rows] == list(cuda.VERBS)
        path = ROOT / "benchmarks" / "results" / "gpu.jsonl"
        recorded = [*map(json.loads, path.read_text().splitlines())] if path.exists() else []
        for verb, default, proof in rows:
            if verb in cuda.PROVEN:
                assert default == "kernel"
                assert any(run in proof for run in proofs(recorded, verb))
            else:
                assert default == "library"
                assert recorded or proof == "no run on a GPU has been recorded"

    def test_a_rehearsal_is_no_proof(self, tmp_path):
        device = rehearsal()
        _, lines = rehearse(device, tmp_path)
        assert all(one["run"] == lines[0]["run"] for one in lines)
        assert proofs(lines, "components") == []


class TestProcesses:
    """A part that hangs, or breaks its process, takes no other with it."""

    def test_each_is_started_with_what_was_asked_for(self, tmp_path, monkeypatch):
        commands = []
        monkeypatch.setattr(command, "within", lambda *arguments: commands.append(arguments) or 0)
        output = str(tmp_path / "gpu.jsonl")
        options = ["--output", output, "--quick", "--commit", "abc", "--only", "2mm-1"]
        assert command.main([*options, "--only", "suite"]) == 0
        (first, limit_s), (second, _) = commands
        assert first[:5] == [sys.executable, "-m", "benchmarks.gpu", "--part", "2mm-1"]
        parsed, other = (command._parser().parse_args(one[3:]) for one in (first, second))
        assert parsed.run == other.run
        assert parsed.run != command._parser().parse_args([]).run
        assert (str(parsed.output), parsed.quick, parsed.commit) == (output, True, "abc")
        assert parsed.budget_s == limit_s
        assert second[4] == "suite"

    def test_what_does_not_end_is_ended_with_all_that_it_started(self, tmp_path):
        sign = tmp_path / "sign"
        child = f"import time; time.sleep(2); open({str(sign)!r}, 'w')"
        code = "import subprocess, sys, time; "
        code += f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
        started = time.monotonic()
        assert command.within([sys.executable, "-c", code], 1) is command.HANGS
        assert time.monotonic() - started < 5
        time.sleep(2.5)
        assert not sign.exists()
        assert command.within([sys.executable, "-c", "raise SystemExit(7)"], 30) == 7

    def test_the_others_are_measured_and_the_table_is_printed(self, tmp_path, capsys):
        device = rehearsal()

        def run_part(part, options, limit_s):
            if part == "2mm-16":
                return command.HANGS
            command.measure(part, options, limit_s, lambda: device)
            if part == "2mm-1":
                with options.output.open("a") as lines:
                    lines.write('{"case": "2mm-1", "sta')  # it was killed while it wrote
                return -11
            return 0

        output = tmp_path / "gpu.jsonl"
        output.write_text('{"case": "of an earlier run", "run": "0"}\n')
        names = ["2mm-16", "2mm-256", "2mm-1"]
        only = [option for name in names for option in ("--only", name)]
        arguments = ["--quick", "--output", str(output), *only]
        assert command.main(arguments, run_part) == 1
        out = capsys.readouterr().out.partition(HEADING)[2]
        assert re.search(r"2mm-16 .* failed: hung: not done after \d+ s", out)
        assert re.search(r"2mm-1 .* failed: its process ended with -11", out)
        assert re.search(rf"2mm-256 +components +{OWN} .* yes", out)
        assert "earlier" not in out

    def test_a_rehearsal_of_the_real_thing(self, tmp_path):
        """Where there is no GPU, the process says so; where there is one, it measures."""
        output = tmp_path / "results" / "gpu.jsonl"
        arguments = ["--quick", "--only", "2mm-1", "--output", str(output)]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        )
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("no CUDA run: ")


class TestSuiteOfTheCudaRun:
    @pytest.fixture
    def outcome(self, tmp_path):
        """Return a function that runs a file of tests as the suite, and gives the records."""

        def run_file(code, missing=(), needed=(), seconds=60):
            file = tmp_path / "test_it.py"
            file.write_text(code)
            device = rehearsal(missing=dict.fromkeys(missing, "not installed"))
            run = one_run(tmp_path, device, seconds)
            suite.run_suite(run, {str(file): needed})
            return {record["contender"]: record for record in run.records}

        return run_file

    def test_it_requires_cuda_once_with_each_kind_of_kernels(self, outcome):
        code = (
            "import os\n"
            "def test_required(): assert os.environ['GPUROI_REQUIRE'] == 'cuda'\n"
            "def test_own(): assert os.environ['GPUROI_CUDA_KERNELS'] == 'own'\n"
        )
        found = outcome(code)
        assert found[OWN]["tests"] == {"passed": 2}
        assert "failed" not in found[OWN]
        assert found[CUPY]["tests"] == {"failed": 1, "passed": 1}
        assert "test_own" in found[CUPY]["failed"]

    def test_it_does_not_pass_by_skipping_or_running_out_of_time(self, outcome):
        skipping = "import pytest\ndef test_it(): pytest.skip('no device')\n"
        assert all("failed" in record for record in outcome(skipping).values())
        waiting = "import time\ndef test_it(): time.sleep(60)\n"
        assert outcome(waiting, seconds=1.5)[OWN]["failed"] == "not done after 1 s"

    def test_what_is_missing_is_named(self, outcome):
        assert outcome("", missing=["pytest"])["-"]["skipped"] == "pytest is missing"
        left_out = outcome("", missing=["nilearn", "cucim"], needed=["nilearn"])
        assert left_out["-"]["skipped"] == "nilearn missing"
        assert list(left_out) == ["-"]  # without a file pytest would run them all

    def test_its_files_need_what_they_import(self):
        for file, needed in suite.TESTS.items():
            code = (ROOT / file).read_text()
            imported = set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))
            others = imported - set(sys.stdlib_module_names) - {"gpuroi", "tests"}
            assert others - {"numpy", "scipy", "pytest"} <= set(needed), file
            assert "nilearn" in needed or "tests.conftest" not in code
        assert suite.CUCIM_TEST.partition("::")[2] in (ROOT / "tests/test_backends.py").read_text()

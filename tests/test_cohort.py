"""Cohorts: what is found, what is done again, and what survives being killed."""

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

import gpuroi
from gpuroi import io
from gpuroi.cohort import _run, _tasks, extract_cohort, find_maps
from gpuroi.cohort._cluster import Cluster
from gpuroi.cohort._engines import each_outcome
from gpuroi.cohort._ledger import Ledger
from gpuroi.cohort._outputs import written_names
from gpuroi.cohort._processes import Processes
from gpuroi.cohort._tasks import Job, make_tools
from gpuroi.errors import FolderInUseError, WorkerDiedError
from gpuroi.recipe import make_recipe
from tests.cohort_files import RECIPE, contents, ledger_of, save_maps
from tests.conftest import image


class TestResults:
    @pytest.mark.parametrize("jobs", [1, 2])
    def test_files_are_those_of_each_map_alone(self, cohort, tmp_path, jobs):
        progress = []
        report = extract_cohort(
            cohort,
            tmp_path / "out",
            RECIPE,
            jobs=jobs,
            batch_size=2,
            on_progress=progress.append,
        )
        assert (report.n_done, report.n_skipped, report.failures) == (12, 0, ())
        counts = [(one.n_to_do, one.n_skipped, one.n_done, one.n_failed) for one in progress]
        assert counts == [(12, 0, n, 0) for n in range(13)]
        assert progress[0].latest is None
        assert {one.latest.stem for one in progress[1:]} == {one.stem for one in report.maps}
        total = np.zeros((12, 13, 14), int)
        rows = []
        for path in sorted(cohort.rglob("*.nii.gz")):
            alone = gpuroi.extract_regions(path, **RECIPE, backend="cpu")
            stem = path.relative_to(cohort).as_posix().removesuffix(".nii.gz")
            alone.save(tmp_path / "alone" / stem)
            for extension in (".nii.gz", ".tsv", ".json"):
                expected = (tmp_path / "alone" / f"{stem}{extension}").read_bytes()
                written = tmp_path / "out" / f"{stem}_desc-regions_dseg{extension}"
                assert written.read_bytes() == expected
            total += alone.labels > 0
            rows += [stem] * len(alone)
            sidecar = json.loads((tmp_path / "out" / f"{stem}_desc-regions_dseg.json").read_text())
            assert sidecar["source_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        table = pd.read_csv(report.summary["regions"], sep="\t")
        assert table["map"].tolist() == rows
        np.testing.assert_array_equal(nib.load(report.summary["overlap"]).dataobj, total)

    def test_the_description_says_what_the_maps_were_made_of(self, cohort, tmp_path):
        report = extract_cohort(cohort, tmp_path / "out", RECIPE, jobs=1)
        description = json.loads(report.summary["description"].read_text())
        assert description["DatasetType"] == "derivative"
        assert description["GeneratedBy"][0]["Version"] == gpuroi.__version__
        assert description["SourceDatasets"] == [{"URL": cohort.as_uri()}]
        (cohort / "dataset_description.json").write_text('{"DatasetDOI": "doi:10.1/x"}')
        # Files, which are of a dataset.
        paths = sorted((cohort / "group-1").rglob("*.nii.gz"))
        report = extract_cohort(paths, tmp_path / "other", RECIPE, jobs=1)
        described = json.loads(report.summary["description"].read_text())["SourceDatasets"]
        assert described == [{"URL": cohort.as_uri(), "DOI": "doi:10.1/x"}]

    def test_series_of_maps(self, tmp_path, blobs):
        volumes = [blobs(seed=seed) for seed in range(3)]
        nib.save(image(np.stack(volumes, axis=-1)), tmp_path / "series.nii")
        report = extract_cohort(tmp_path / "series.nii", tmp_path / "out", RECIPE, jobs=1)
        assert report.n_done == 1
        labels = tmp_path / "out" / "series_vol-0002_desc-regions_dseg.nii.gz"
        expected = gpuroi.extract_regions(image(volumes[2]), **RECIPE).labels
        np.testing.assert_array_equal(nib.load(labels).dataobj, expected)

    def test_grids_that_differ_have_no_overlap(self, tmp_path, blobs):
        save_maps(tmp_path / "in", ["a.nii"], blobs)
        save_maps(tmp_path / "in", ["b.nii"], blobs, shape=(9, 9, 9))
        assert "overlap" not in extract_cohort(tmp_path / "in", tmp_path / "out", RECIPE).summary

    def test_outputs_are_no_inputs(self, cohort, tmp_path):
        (tmp_path / "link").symlink_to(cohort)
        for out in ("out", "other", "out", "."):
            for inputs in (cohort, tmp_path / "link", str(cohort / "**" / "*.nii.gz")):
                stems = {one.stem.rpartition("/")[2] for one in find_maps([inputs])}
                assert stems == {f"sub-{i:02d}_tmap" for i in range(12)}
            report = extract_cohort(cohort, cohort / out, RECIPE, jobs=1, limit=2)
            assert report.n_done + report.n_skipped == 2

    def test_names_that_are_not_utf8_or_have_tabs(self, tmp_path, blobs):
        names = ["caf\udce9.nii.gz", "a\tb.nii.gz", "c.nii.gz"]
        save_maps(tmp_path / "in", names, blobs)
        (tmp_path / "in" / "d\udce9.nii.gz").write_bytes(b"no map")
        report = extract_cohort(tmp_path / "in", tmp_path / "out", RECIPE, jobs=1)
        table = report.summary["regions"].read_bytes().splitlines()
        assert {row.split(b"\t")[0] for row in table} == {b"map", b"caf\xe9", b"a b", b"c"}
        assert len({row.count(b"\t") for row in table}) == 1
        assert b"d\xe9.nii.gz" in report.summary["failures"].read_bytes()


class TestFailures:
    def test_a_failed_map_is_a_row(self, cohort, tmp_path):
        damaged, fifo, folder = (
            cohort / f"{name}.nii.gz" for name in ("damaged", "fifo", "folder")
        )
        whole = next(cohort.rglob("*.nii.gz")).read_bytes()
        damaged.write_bytes(whole[:-20])
        os.mkfifo(fifo)
        folder.mkdir()
        missing = tmp_path / "missing.nii"
        report = extract_cohort([cohort, missing], tmp_path / "out", RECIPE, jobs=2, batch_size=3)
        assert report.n_done == 12
        table = pd.read_csv(report.summary["failures"], sep="\t")
        assert [Path(source).name for source in table["source"]] == [
            "damaged.nii.gz",
            "fifo.nii.gz",
            "folder.nii.gz",
            "missing.nii",
        ]
        assert set(table["error"]) == {"InvalidMapError"}
        for message, found in zip(
            table["message"], ["damaged, cut short", "a pipe", "a folder", "no such"], strict=True
        ):
            assert found in message
        assert not [name for name in contents(tmp_path / "out") if "damaged" in name]

    def test_failures_stay_until_they_change_or_are_to_be_tried_again(self, cohort, tmp_path):
        damaged = cohort / "damaged.nii.gz"
        whole = next(cohort.rglob("*.nii.gz")).read_bytes()
        damaged.write_bytes(whole[:-20])

        def run(**options):
            report = extract_cohort(cohort, tmp_path / "out", RECIPE, jobs=1, **options)
            return (
                report.n_done,
                report.n_skipped,
                len(report.failures),
                len(ledger_of(report.folder)),
            )

        assert run() == (12, 0, 1, 13)
        assert run() == (0, 12, 1, 13)
        assert run(retry_failed=True) == (0, 12, 1, 14)
        damaged.write_bytes(whole)
        assert run() == (1, 12, 0, 15)

    def test_what_a_killed_process_had_written_goes_with_its_map(
        self, cohort, tmp_path, monkeypatch
    ):
        """As if a process had been killed between two files of a map."""
        killed = "group-1/sub-03_tmap"

        def each(engine, task, jobs, unit_size):
            for job, outcome in each_outcome(engine, task, jobs, unit_size):
                if getattr(job, "stem", "") == killed and task is _tasks.extract:
                    path = tmp_path / "out" / f"{killed}_desc-regions_dseg.json"
                    path.unlink()
                    yield job, WorkerDiedError("killed")
                else:
                    yield job, outcome

        monkeypatch.setattr(_run, "each_outcome", each)
        report = extract_cohort(cohort, tmp_path / "out", RECIPE, jobs=2)
        assert [one.stem for one in report.failures] == [killed]
        assert not [name for name in contents(tmp_path / "out") if killed in name]

    def test_large_units_and_outcomes_pass_through(self):
        """More than the pipes hold, both ways at once."""
        units = [(bytes(300_000),) for _ in range(40)]
        with Processes(2, _Deadly, (set(),)) as engine:
            outcomes = [outcome for _, outcome in engine.run(_doubled, units)]
        assert {len(outcome[0]) for outcome in outcomes} == {600_000}
        assert len(outcomes) == 40

    def test_a_process_has_one_thread_of_blas(self):
        with Processes(
            1,
            make_tools,
            (Job(Path(), make_recipe(), "", "cpu", False, gpuroi.__version__, (Path(), "")),),
        ) as engine:
            ((_, outcomes),) = engine.run(_blas_threads, [(0,)])
        assert outcomes[0]
        assert set(outcomes[0]) == {1}

    @pytest.mark.parametrize("unit_size", [1, 4])
    def test_a_killed_process_costs_its_own_job(self, unit_size):
        with Processes(2, _Deadly, ({7, 12},)) as engine:
            results = dict(each_outcome(engine, _squares, range(20), unit_size))
        assert {job for job, result in results.items() if isinstance(result, WorkerDiedError)} == {
            7,
            12,
        }
        assert all(results[job] == job**2 for job in range(20) if job not in {7, 12})
        assert "SIGKILL, perhaps for want of memory" in str(results[7])

    def test_what_a_killed_process_was_writing_goes_with_the_run(self, cohort, tmp_path):
        def leave_one(progress):
            name = ".sub-03_tmap_desc-regions_dseg.tsv.4711-0a1b2c3d.tmp"
            (tmp_path / "out" / "group-1").mkdir(exist_ok=True)
            (tmp_path / "out" / "group-1" / name).touch()

        extract_cohort(cohort, tmp_path / "out", RECIPE, jobs=1, on_progress=leave_one)
        assert not list((tmp_path / "out").rglob("*.tmp"))

    def test_a_script_needs_no_guard(self, cohort, tmp_path):
        """Processes do not read the script anew: they would begin the run again."""
        script = (
            "from gpuroi import extract_cohort\nprint(extract_cohort({!r}, {!r}, jobs=2).n_done)"
        )
        (tmp_path / "run.py").write_text(script.format(str(cohort), str(tmp_path / "out")))
        command = [sys.executable, tmp_path / "run.py"]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        assert run.stdout == "12\n"

    def test_processes_that_cannot_begin_end_the_run(self):
        with (
            pytest.raises(WorkerDiedError, match="worker processes end before they begin"),
            Processes(2, _cannot_begin, ()) as engine,
        ):
            list(each_outcome(engine, _squares, range(5), 1))

    def test_an_error_of_a_task_ends_the_run(self):
        with (
            pytest.raises(TypeError, match="unsupported operand"),
            Processes(2, _Deadly, (set(),)) as engine,
        ):
            list(each_outcome(engine, _squares, [1, "one", 2], 1))

    def test_a_folder_is_used_by_one_run(self, cohort, tmp_path):
        with (
            Ledger(tmp_path / "out", None),
            pytest.raises(FolderInUseError, match="is in use by another run"),
        ):
            extract_cohort(cohort, tmp_path / "out", RECIPE)
        for held, asked in [(None, (1, 2)), ((1, 2), None), ((1, 2), (1, 3)), ((1, 2), (1, 2))]:
            with Ledger(tmp_path / "out", held), pytest.raises(FolderInUseError):
                extract_cohort(cohort, tmp_path / "out", RECIPE, shard=asked)
        first = extract_cohort(cohort, tmp_path / "out", RECIPE, shard=(1, 2))
        with Ledger(tmp_path / "out", (1, 2)):  # other shards may
            second = extract_cohort(cohort, tmp_path / "out", RECIPE, shard=(2, 2))
        assert first.n_done + second.n_done == 12
        assert first.summary == second.summary == {}  # the other had not begun, or not ended
        again = extract_cohort(cohort, tmp_path / "out", RECIPE, shard=(1, 2))
        assert (again.n_done, again.n_skipped) == (0, 6)
        assert len(set(pd.read_csv(again.summary["regions"], sep="\t")["map"])) == 12

    def test_a_file_replaced_while_it_is_read(self, cohort, tmp_path, blobs, monkeypatch):
        path = sorted(cohort.rglob("*.nii.gz"))[0]

        def read_and_replace(source):
            volumes = read_maps(source)
            nib.save(image(blobs((12, 13, 14), seed=99)), tmp_path / "new.nii.gz")
            (tmp_path / "new.nii.gz").replace(path)
            return volumes

        read_maps = io.read_maps
        monkeypatch.setattr(io, "read_maps", read_and_replace)
        report = extract_cohort(path, tmp_path / "out", RECIPE)
        (failure,) = report.failures
        assert "was changed while it was read" in failure.message
        assert set(contents(tmp_path / "out")) == {"dataset_description.json", "failures.tsv"}
        monkeypatch.undo()
        report = extract_cohort(path, tmp_path / "out", RECIPE)  # as it is now
        assert (report.n_done, report.failures) == (1, ())
        assert "failures.tsv" not in contents(tmp_path / "out")

    def test_damage_is_caught_or_harmless(self, tmp_path, blobs):
        """A flipped byte may be in a field of gzip's header that says nothing of the data."""
        (whole,) = save_maps(tmp_path / "whole", ["m.nii.gz"], blobs)
        content = whole.read_bytes()
        rng = np.random.default_rng(0)
        (tmp_path / "in").mkdir()
        for number, place in enumerate([*range(10), *rng.integers(0, len(content), 290)]):
            flipped = bytearray(content)
            flipped[place] ^= rng.integers(1, 256)
            (tmp_path / "in" / f"flip-{number:03d}.nii.gz").write_bytes(flipped)
        for number, length in enumerate(rng.integers(0, len(content), 100)):
            (tmp_path / "in" / f"cut-{number:03d}.nii.gz").write_bytes(content[:length])
        extract_cohort(whole, tmp_path / "expected", RECIPE)
        out = tmp_path / "out"
        report = extract_cohort(tmp_path / "in", out, RECIPE, jobs=2)
        assert report.n_done + len(report.failures) == 400
        assert {failure.error for failure in report.failures} == {"InvalidMapError"}
        done = {one.stem for one in report.maps} - {one.stem for one in report.failures}
        assert not any(stem.startswith("cut") for stem in done)
        assert {f"flip-{place:03d}" for place in range(4, 9)} <= done  # time, level
        assert len(done) < 20
        for extension in (".nii.gz", ".tsv"):
            ending = f"_desc-regions_dseg{extension}"
            expected = (tmp_path / "expected" / f"m{ending}").read_bytes()
            assert {(out / f"{stem}{ending}").read_bytes() for stem in done} == {expected}
            assert len(list(out.glob(f"*{ending}"))) == len(done)

    def test_a_map_has_all_its_files_or_none(self, tmp_path, blobs):
        (path,) = save_maps(tmp_path / "in", ["m.nii.gz"], blobs)
        in_the_way = tmp_path / "out" / "m_desc-regions_dseg.json"
        in_the_way.mkdir(parents=True)
        report = extract_cohort(path, tmp_path / "out", RECIPE)
        assert report.failures[0].error == "IsADirectoryError"
        assert set(contents(tmp_path / "out")) == {"dataset_description.json", "failures.tsv"}

    def test_the_last_record_of_a_map_holds_whichever_run_wrote_it(self, cohort, tmp_path):
        other = RECIPE | {"threshold": "95%"}
        extract_cohort(cohort, tmp_path / "out", RECIPE, jobs=1)
        for _ in range(2):
            shards = [
                extract_cohort(cohort, tmp_path / "out", other, jobs=1, shard=(i, 2))
                for i in (1, 2)
            ]
        assert [(one.n_done, one.n_skipped) for one in shards] == [(0, 6), (0, 6)]
        table = pd.read_csv(shards[1].summary["regions"], sep="\t")
        assert len(set(table["map"])) == 12
        assert extract_cohort(cohort, tmp_path / "out", other, jobs=1).n_skipped == 12

    def test_a_ledger_that_cannot_be_read_is_left_to_others(self, tmp_path, monkeypatch):
        with monkeypatch.context() as patched:
            patched.setattr(Ledger, "read", Mock(side_effect=OSError("cannot")))
            with pytest.raises(OSError, match="cannot"):
                Ledger(tmp_path, None).__enter__()
        assert not list(tmp_path.rglob("*.reserve"))
        with Ledger(tmp_path, None):
            pass

    @pytest.mark.skipif(not shutil.which("unshare"), reason="no unshare to mount a disk with")
    def test_a_full_or_read_only_disk(self, tmp_path, blobs):
        save_maps(tmp_path / "in", [f"m{i:02d}.nii.gz" for i in range(40)], blobs)
        extract_cohort(tmp_path / "in", tmp_path / "calm", RECIPE, jobs=2)
        out = tmp_path / "out"
        out.mkdir()
        (tmp_path / "run.py").write_text(DISK_SCRIPT)
        command = [sys.executable, tmp_path / "run.py", tmp_path / "in", out]
        # A mount that nobody else sees, and that ends with the process.
        run = subprocess.run(
            ["unshare", "--map-root-user", "--mount", *command],
            capture_output=True,
            text=True,
            check=False,
        )
        if "mount" in run.stderr or "unshare" in run.stderr:
            pytest.skip(f"no disk can be mounted here: {run.stderr.strip()}")
        assert run.returncode == 0, run.stderr
        full, read_only, found = json.loads(run.stdout)
        assert full["error"] == f"{out} cannot be written to: No space left on device."
        assert 0 < full["n_whole"] < 40
        assert (full["n_partial"], full["temporary"]) == (0, [])
        assert full["rows"] >= 1  # what ended at the same time may have none, and is done again
        assert full["failures"][1].endswith(f"OutputError\t{full['error']}")
        assert "Read-only file system" in read_only
        assert found == contents(tmp_path / "calm")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_that_cannot_be_written_to(self, cohort, tmp_path):
        (tmp_path / "out").mkdir(mode=0o500)
        with pytest.raises(PermissionError):
            extract_cohort(cohort, tmp_path / "out", RECIPE)


# Fills a small disk, makes it read-only, makes it larger; tells what is there after each.
DISK_SCRIPT = """
import json, subprocess, sys
from collections import Counter
from pathlib import Path
from gpuroi.cohort import extract_cohort
from tests.cohort_files import RECIPE, contents

def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", sys.argv[2]], check=True)

def run():
    try:
        extract_cohort(sys.argv[1], out, RECIPE, jobs=2, backend="cpu")
    except OSError as error:
        return str(error)

if __name__ == "__main__":
    out = Path(sys.argv[2])
    mount("size=300k")
    full = {"error": run()}
    files = Counter(path.name.split("_")[0] for path in out.glob("m*"))
    full["n_whole"] = sum(n == 3 for n in files.values())
    full["n_partial"] = sum(n != 3 for n in files.values())
    full["temporary"] = [path.name for path in out.rglob("*.tmp")]
    full["failures"] = (out / "failures.tsv").read_text().splitlines()
    full["rows"] = len((out / ".gpuroi" / "ledger.jsonl").read_text().splitlines())
    mount("remount,ro")
    read_only = run()
    mount("remount,rw,size=10m")
    run()
    print(json.dumps([full, read_only, contents(out)]))
"""


class _Deadly:
    def __init__(self, jobs):
        self.jobs = jobs


def _squares(deadly, unit):
    if not deadly.jobs.isdisjoint(unit):
        os.kill(os.getpid(), signal.SIGKILL)
    return [job**2 for job in unit]


def _doubled(tools, unit):
    return [job + job for job in unit]


def _blas_threads(tools, unit):
    import scipy.linalg  # loads a BLAS of its own
    from threadpoolctl import threadpool_info

    scipy.linalg.inv(np.eye(3))
    return [[one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"]]


def _cannot_begin():
    os._exit(3)


class TestResuming:
    def test_what_is_done_is_not_done_again(self, cohort, tmp_path):
        extract_cohort(cohort, tmp_path / "out", RECIPE, jobs=1, limit=5)
        report = extract_cohort(cohort, tmp_path / "out", RECIPE, jobs=1)
        assert (report.n_done, report.n_skipped) == (7, 5)

    def test_what_is_damaged_gone_or_changed_is_done_again(self, cohort, tmp_path):
        out = tmp_path / "out"
        extract_cohort(cohort, out, RECIPE, jobs=1)
        before = contents(out)
        labels = sorted(out.rglob("*.nii.gz"))
        labels[0].write_bytes(labels[0].read_bytes()[:-1] + b"!")
        labels[1].unlink()
        changed = sorted(cohort.rglob("*.nii.gz"))[5]
        os.utime(changed, ns=(1, 1))
        report = extract_cohort(cohort, out, RECIPE, jobs=1)
        assert (report.n_done, report.n_skipped) == (3, 9)
        assert contents(out) == before

    @pytest.mark.parametrize("change", ["size", "time", "stem"])
    def test_each_part_of_a_maps_identity_counts(self, cohort, tmp_path, change):
        path = sorted(cohort.rglob("*.nii.gz"))[0]
        before = path.stat()
        extract_cohort(path, tmp_path / "out", RECIPE)
        inputs = path
        if change == "size":  # a gzip stream may have empty members behind it
            path.write_bytes(path.read_bytes() + gzip.compress(b""))
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        elif change == "time":
            os.utime(path, ns=(1, 1))
        else:
            inputs = cohort
        report = extract_cohort(inputs, tmp_path / "out", RECIPE, jobs=1, limit=1)
        assert (report.n_done, report.n_skipped) == (1, 0)

    def test_the_other_file_of_a_pair_counts(self, tmp_path, blobs):
        nib.save(nib.Nifti1Pair(blobs(seed=1), np.eye(4)), tmp_path / "a.img")
        for n_done in (1, 0):
            report = extract_cohort(tmp_path / "a.hdr", tmp_path / "out", RECIPE)
            assert (report.n_done, report.n_skipped) == (n_done, 1 - n_done)
        header = (tmp_path / "a.hdr").read_bytes()
        nib.save(nib.Nifti1Pair(blobs(seed=2), np.eye(4)), tmp_path / "a.img")
        assert (tmp_path / "a.hdr").read_bytes() == header
        assert extract_cohort(tmp_path / "a.hdr", tmp_path / "out", RECIPE).n_done == 1

    def test_outputs_go_when_a_map_fails_or_has_fewer_volumes(self, tmp_path, blobs):
        path = tmp_path / "m.nii.gz"
        series = np.stack([blobs(seed=seed) for seed in range(3)], axis=-1)

        def names():
            return {name for name in contents(tmp_path / "out") if name.startswith("m")}

        for data, n_files in [(series, 9), (series[..., 0], 3), (None, 0)]:
            path.write_bytes(b"no map") if data is None else nib.save(image(data), path)
            extract_cohort(path, tmp_path / "out", RECIPE)
            assert len(names()) == n_files

    def test_no_outputs_of_other_maps_are_removed(self, tmp_path, blobs):
        names = ["x.nii.gz", "A/x.nii.gz", "b_vol-0001.nii.gz", "B/x.nii.gz"]
        save_maps(tmp_path / "m", names, blobs)
        out = tmp_path / "out"

        def labels():
            return {path.relative_to(out).as_posix() for path in out.rglob("*_dseg.nii.gz")}

        extract_cohort(tmp_path / "m" / "A", out, RECIPE, jobs=1)  # A/x is called x
        extract_cohort(tmp_path / "m", out, RECIPE, jobs=1)  # now m/x is
        stems = ["x", "A/x", "B/x", "b_vol-0001"]
        assert labels() == {f"{stem}_desc-regions_dseg.nii.gz" for stem in stems}
        assert extract_cohort(tmp_path / "m", out, RECIPE, jobs=1).n_skipped == 4
        assert written_names(out, {"b"}) == {"b_vol-0001_desc-regions_dseg"}  # it could be
        assert written_names(out, {"b_vol-0001"}) == {"b_vol-0001_desc-regions_dseg"}

        before = contents(out)
        with pytest.raises(ValueError, match=r"m/x\.nii\.gz, which those of \S+/B/x\.nii\.gz may"):
            extract_cohort(tmp_path / "m" / "B", out, RECIPE, jobs=1)
        assert contents(out) == before
        (tmp_path / "m" / "x.nii.gz").unlink()
        extract_cohort(tmp_path / "m" / "B", out, RECIPE, jobs=1)  # takes its place
        assert "x_desc-regions_dseg.nii.gz" in labels()
        assert "B/x_desc-regions_dseg.nii.gz" not in labels()

    def test_the_place_of_a_series_is_taken_whole(self, tmp_path, blobs):
        series = np.stack([blobs(seed=seed) for seed in range(3)], axis=-1)
        for name, data in [("A", series), ("B", series[..., 0])]:
            (tmp_path / name).mkdir()
            nib.save(image(data), tmp_path / name / "x.nii.gz")
            extract_cohort(tmp_path / name / "x.nii.gz", tmp_path / "out", RECIPE)
            (tmp_path / name / "x.nii.gz").unlink()
        assert len([name for name in contents(tmp_path / "out") if name.startswith("x")]) == 3

    def test_results_beside_and_among_the_maps(self, tmp_path, blobs, monkeypatch):
        save_maps(tmp_path / "m", ["a.nii.gz", "b.nii.gz", "sub/c.nii.gz"], blobs)
        monkeypatch.chdir(tmp_path / "m")
        for out in (".", "sub"):
            for inputs, n_maps in [(".", 3), ("*", 3), ("**/*", 3)]:
                assert len(extract_cohort(inputs, out, RECIPE, jobs=1).maps) == n_maps

    def test_the_description_of_a_dataset_stays(self, tmp_path, blobs):
        save_maps(tmp_path, ["sub-01_stat-t_statmap.nii.gz"], blobs)
        description = tmp_path / "dataset_description.json"
        description.write_text('{"Name": "theirs"}')
        for _ in range(2):
            assert len(extract_cohort(tmp_path, tmp_path, RECIPE).maps) == 1
        assert description.read_text() == '{"Name": "theirs"}'

    def test_a_shard_that_ended_with_other_work_has_not_ended(self, cohort, tmp_path):
        for recipe in (RECIPE, RECIPE | {"threshold": "95%"}):
            summaries = [
                extract_cohort(cohort, tmp_path / "out", recipe, jobs=1, shard=(i, 2)).summary
                for i in (1, 2)
            ]
            assert [bool(summary) for summary in summaries] == [False, True]

    def test_summaries_are_about_the_maps_that_are_named(self, cohort, tmp_path):
        out = tmp_path / "out"
        missing = tmp_path / "typo.nii"
        extract_cohort([cohort / "group-0", missing], out, RECIPE, jobs=1)
        for path in sorted(out.glob("sub-00*")):
            path.unlink()
        report = extract_cohort(cohort / "group-1", out, RECIPE, jobs=1)
        table = pd.read_csv(report.summary["regions"], sep="\t")
        assert set(table["map"]) == {one.stem for one in report.maps}
        assert "failures" not in report.summary
        assert not (out / "failures.tsv").exists()
        moved = tmp_path / "moved"
        shutil.move(cohort / "group-1", moved)  # the same names from another place
        report = extract_cohort(moved, out, RECIPE, jobs=1)
        again = pd.read_csv(report.summary["regions"], sep="\t")
        pd.testing.assert_frame_equal(again, table)

    def test_a_run_that_stops_leaves_no_summary_of_other_parameters(self, cohort, tmp_path):
        def stop(progress):
            if progress.n_done == 2:
                raise KeyboardInterrupt

        extract_cohort(cohort, tmp_path / "out", RECIPE, jobs=1)
        other = RECIPE | {"threshold": "95%"}
        with pytest.raises(KeyboardInterrupt):
            extract_cohort(cohort, tmp_path / "out", other, jobs=1, on_progress=stop)
        assert not {"regions.tsv", "overlap.nii.gz"} & set(contents(tmp_path / "out"))

    def test_failures_are_tried_with_a_mask_that_may_be_resampled(self, cohort, tmp_path):
        recipe = RECIPE | {"mask_img": image(np.ones((9, 9, 9), np.uint8))}
        assert len(extract_cohort(cohort, tmp_path / "out", recipe, jobs=1).failures) == 12
        report = extract_cohort(cohort, tmp_path / "out", recipe | {"resample_mask": True}, jobs=1)
        assert (report.n_done, report.failures) == (12, ())

    def test_other_parameters_do_all_again(self, cohort, tmp_path):
        extract_cohort(cohort, tmp_path / "out", RECIPE, jobs=1)
        report = extract_cohort(cohort, tmp_path / "out", RECIPE | {"threshold": "95%"}, jobs=1)
        assert (report.n_done, report.n_skipped) == (12, 0)

    def test_other_voxels_of_a_mask_do_all_again(self, cohort, tmp_path, blobs):
        mask = np.ones((12, 13, 14), np.uint8)
        for n_done in (12, 0):
            options = RECIPE | {"mask_img": image(mask)}
            assert extract_cohort(cohort, tmp_path / "out", options, jobs=1).n_done == n_done
        mask[0] = 0
        options = RECIPE | {"mask_img": image(mask)}
        assert extract_cohort(cohort, tmp_path / "out", options, jobs=1).n_done == 12

    def test_a_torn_line_is_one_map_more_to_do(self, cohort, tmp_path):
        extract_cohort(cohort, tmp_path / "out", RECIPE, jobs=1)
        ledger = tmp_path / "out" / ".gpuroi" / "ledger.jsonl"
        ledger.write_bytes(ledger.read_bytes()[:-30])
        report = extract_cohort(cohort, tmp_path / "out", RECIPE, jobs=1)
        assert (report.n_done, report.n_skipped) == (1, 11)
        assert extract_cohort(cohort, tmp_path / "out", RECIPE, jobs=1).n_skipped == 12


SCRIPT = """
import sys
from gpuroi.cohort import extract_cohort
if __name__ == "__main__":
    extract_cohort(sys.argv[1], sys.argv[2], {"threshold": "90%", "min_region_size": 20}, jobs=2)
"""


@pytest.mark.slow
def test_twenty_kills_leave_the_same_bytes(tmp_path, blobs):
    names = [f"g{i % 3}/m{i:04d}.nii.gz" for i in range(1500)]
    first = save_maps(tmp_path / "in", names[:30], blobs, shape=(24, 26, 28))
    for i, name in enumerate(names[30:]):
        shutil.copy(first[i % 30], tmp_path / "in" / name)
    extract_cohort(tmp_path / "in", tmp_path / "calm", RECIPE, jobs=2)
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "run.py", tmp_path / "in", tmp_path / "out"]
    rng = np.random.default_rng(0)
    ledger = tmp_path / "out" / ".gpuroi" / "ledger.jsonl"

    def n_lines():
        return len(ledger.read_bytes().splitlines()) if ledger.exists() else 0

    n_done = []
    for _ in range(20):
        run = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        enough = n_lines() + rng.integers(0, 70)
        while run.poll() is None and n_lines() < enough:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.01))  # in the middle of whatever comes next
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        n_done.append(n_lines())
    subprocess.run(command, check=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")
    done = [one["source"] for one in ledger_of(tmp_path / "out") if one["status"] == "done"]
    assert len(done) == len(set(done)) == 1500
    assert len(set(n_done)) > 10  # the kills did hit it at work
    assert not list((tmp_path / "out").rglob("*.tmp"))


class TestDask:
    @pytest.fixture
    def client(self):
        distributed = pytest.importorskip("distributed")
        options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
        with (
            distributed.LocalCluster(**options, silence_logs=50) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield client

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")  # of distributed and tornado, about sockets that close
    def test_a_cluster_writes_the_same_bytes_though_a_worker_is_killed(
        self, client, cohort, tmp_path
    ):
        extract_cohort(cohort, tmp_path / "here", RECIPE, jobs=1)
        processes = client.run(os.getpid)

        def kill_one(progress):
            if progress.n_done == 2:
                os.kill(next(iter(processes.values())), signal.SIGKILL)

        report = extract_cohort(
            cohort, tmp_path / "there", RECIPE, client=client, batch_size=1, on_progress=kill_one
        )
        assert (report.n_done, report.failures) == (12, ())
        assert contents(tmp_path / "there") == contents(tmp_path / "here")

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    def test_workers_elsewhere_that_come_late_and_go_on_after_the_end(
        self, client, cohort, tmp_path, monkeypatch
    ):
        client.run(os.chdir, "/")
        monkeypatch.chdir(tmp_path)

        def stop(progress):
            if progress.n_done == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            extract_cohort("maps", "out", RECIPE, client=client, batch_size=1, on_progress=stop)
        before = contents(tmp_path / "out")
        time.sleep(1)
        assert contents(tmp_path / "out") == before
        report = extract_cohort("maps", "out", RECIPE, client=client)
        assert report.n_done + report.n_skipped == 12

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    def test_warnings_are_those_of_their_map_whatever_the_threads(self, tmp_path, blobs):
        distributed = pytest.importorskip("distributed")
        for i in range(40):
            data = blobs((12, 13, 14), seed=i)
            data[0, 0, : i % 4] = np.nan
            (tmp_path / "in").mkdir(exist_ok=True)
            nib.save(image(data), tmp_path / "in" / f"m{i:02d}.nii")
        options = {"n_workers": 1, "threads_per_worker": 4, "dashboard_address": None}
        with (
            distributed.LocalCluster(**options, silence_logs=50) as cluster,
            distributed.Client(cluster) as client,
        ):
            report = extract_cohort(
                tmp_path / "in", tmp_path / "out", RECIPE, client=client, batch_size=2
            )
        for i, record in enumerate(report.records):
            name = (
                f"{record.source}: {i % 4} voxel{'s are' if i % 4 > 1 else ' is'} NaN or infinite"
            )
            assert [warning.startswith(name) for warning in record.warnings] == [True] * (i % 4 > 0)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    def test_a_job_that_kills_its_workers_is_lost_alone(self, client):
        with Cluster(client, _Deadly, ({4},)) as engine:
            results = dict(each_outcome(engine, _squares, range(6), 3))
        assert isinstance(results.pop(4), WorkerDiedError)
        assert results == {job: job**2 for job in (0, 1, 2, 3, 5)}

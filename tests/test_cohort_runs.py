"""Cohorts: one run after another, or beside it, in the same folder."""

import errno
import json
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import distributed
import nibabel as nib
import numpy as np
import pandas as pd
import pytest

import gpuroi
from gpuroi.cohort import _run, _tasks, extract_cohort, write_report
from gpuroi.cohort._engines import each_outcome
from gpuroi.cohort._ledger import Ledger
from gpuroi.errors import FolderInUseError, OutputChangedError, UnknownBackendError, WorkerDiedError
from tests.cohort_files import RECIPE, contents, save_maps
from tests.conftest import image

OTHER = RECIPE | {"threshold": "95%"}


def run(inputs, out, recipe=RECIPE, **options):
    return extract_cohort(inputs, out, recipe, jobs=1, **options)


def outputs(folder):
    return {name: digest for name, digest in contents(folder).items() if "_dseg." in name}


class TestMissingMaps:
    """A disk that is not mounted for a while costs nothing."""

    @pytest.fixture
    def paths(self, tmp_path, blobs):
        return save_maps(tmp_path / "m", [f"m{number}.nii.gz" for number in range(4)], blobs)

    @pytest.fixture
    def out(self, paths, tmp_path):
        run(paths, tmp_path / "out")
        return tmp_path / "out"

    def test_keep_their_results(self, paths, out):
        before = contents(out)
        away = [path.rename(path.with_suffix(".away")) for path in paths[:3]]
        for _ in range(2):
            report = run(paths, out)
            assert [one.is_missing for one in report.failures] == [True] * 3
            assert outputs(out) == {name: before[name] for name in before if "_dseg." in name}
        for path, elsewhere in zip(paths[:3], away, strict=True):
            elsewhere.rename(path)
        report = run(paths, out)
        assert (report.n_done, report.n_skipped, report.failures) == (0, 4, ())
        assert contents(out) == before
        assert run(paths, out).n_skipped == 4

    def test_end_the_run_if_all_are_missing(self, paths, out):
        before = contents(out)
        paths[0].parent.rename(paths[0].parent.with_name("away"))
        with pytest.raises(ValueError, match="none of 4 maps is there, neither"):
            run(paths, out)
        assert contents(out) == before

    def test_are_done_again_if_what_comes_back_is_not_what_was_there(self, paths, out):
        content = paths[1].read_bytes()
        paths[1].unlink()
        assert len(run(paths, out).failures) == 1
        paths[1].write_bytes(content)  # at another time
        assert (run(paths, out).n_done, len(outputs(out))) == (1, 12)
        paths[1].unlink()
        run(paths, out)
        paths[1].write_bytes(b"damaged")
        assert len(run(paths, out).failures) == 1
        assert not [name for name in outputs(out) if name.startswith("m1")]

    def test_lose_results_of_other_parameters(self, paths, out):
        paths[1].unlink()
        assert run(paths, out, OTHER).n_done == 3
        assert not [name for name in outputs(out) if name.startswith("m1")]

    def test_keep_their_results_when_they_are_named_in_another_way(self, tmp_path, blobs):
        paths = save_maps(tmp_path, [f"s{number}/spmT.nii" for number in (1, 2, 3)], blobs)
        out = tmp_path / "out"
        run(paths[0], out)
        before = outputs(out)
        away = paths[0].rename(tmp_path / "away")
        run(paths, out)
        assert len(outputs(out)) == 9
        assert before.items() <= outputs(out).items()
        away.rename(paths[0])
        run(paths, out)
        assert {Path(name).parent.name for name in outputs(out)} == {"s1", "s2", "s3"}

    def test_are_missing_by_half(self, tmp_path, blobs):
        for name in ("x", "y", "z"):
            nib.Nifti1Pair(blobs(), np.eye(4)).to_filename(tmp_path / f"{name}.img")
        paths = [tmp_path / "x.hdr", tmp_path / "y.hdr", tmp_path / "z.hdr"]
        run(paths, tmp_path / "out")
        before = outputs(tmp_path / "out")
        (tmp_path / "x.hdr").rename(tmp_path / "x.away")
        (tmp_path / "y.img").rename(tmp_path / "y.away")
        assert len(run(paths, tmp_path / "out").failures) == 2
        assert outputs(tmp_path / "out") == before


class TestOtherMapsOfTheName:
    def test_are_refused_while_the_first_is_there(self, tmp_path, blobs):
        paths = save_maps(tmp_path, ["s1/spmT_0001.nii", "s2/spmT_0001.nii"], blobs)
        out = tmp_path / "out"
        run(paths[0], out)
        before = contents(out)
        with pytest.raises(ValueError, match=r"has the regions of \S+s1/spmT_0001\.nii, which"):
            run(paths[1], out)
        assert contents(out) == before
        run(paths, out)  # together, both keep their folders
        assert {Path(name).parent.name for name in outputs(out)} == {"s1", "s2"}

    def test_are_refused_as_volumes_too(self, tmp_path, blobs):
        paths = save_maps(tmp_path, ["A/a.nii", "B/a_vol-0001.nii"], blobs)
        nib.save(image(np.stack([blobs(), blobs(seed=1)], axis=-1)), paths[0])
        for first, second in (paths, paths[::-1]):
            out = tmp_path / f"out-{first.stem}"
            run(first, out)
            before = contents(out)
            with pytest.raises(ValueError, match=r"Name the folder that holds both \(/"):
                run(second, out)
            assert contents(out) == before

    def test_are_refused_while_the_first_is_a_link_to_what_is_not_fetched(self, tmp_path, blobs):
        paths = save_maps(tmp_path, ["annex/k.nii", "B/x.nii"], blobs)
        (tmp_path / "A").mkdir()
        (tmp_path / "A" / "x.nii").symlink_to("../annex/k.nii")
        run(tmp_path / "A", tmp_path / "out")
        paths[0].unlink()
        with pytest.raises(ValueError, match="has the regions of"):
            run(tmp_path / "B", tmp_path / "out")

    def test_are_refused_while_nobody_can_tell(self, tmp_path, blobs, monkeypatch):
        paths = save_maps(tmp_path, ["A/x.nii", "B/x.nii"], blobs)
        run(paths[0], tmp_path / "out")
        lstat = os.lstat

        def stale(path, *arguments, **options):
            if path == str(paths[0]):
                raise OSError(errno.ESTALE, "Stale file handle")
            return lstat(path, *arguments, **options)

        monkeypatch.setattr(os, "lstat", stale)
        with pytest.raises(ValueError, match="has the regions of"):
            run(paths[1], tmp_path / "out")

    def test_do_not_stand_for_one_that_fails(self, tmp_path, blobs):
        paths = save_maps(tmp_path / "top", ["A/x.nii", "B/y.nii"], blobs)
        bad = tmp_path / "top" / "x.nii"
        bad.write_bytes(b"no map")
        out = tmp_path / "out"
        run(paths[0], out)  # is called x, as the bad one is below
        run(tmp_path / "top", out)
        run(tmp_path / "top", tmp_path / "fresh")
        assert contents(out) == contents(tmp_path / "fresh")

    def test_do_not_stand_for_one_that_took_their_place_and_fails(self, tmp_path, blobs):
        paths = save_maps(tmp_path / "A", ["x.nii", "y.nii"], blobs)
        run(tmp_path / "A", tmp_path / "out")
        (tmp_path / "A").rename(tmp_path / "B")
        (tmp_path / "B" / paths[0].name).write_bytes(b"no map")
        run(tmp_path / "B", tmp_path / "out")
        assert {name[0] for name in outputs(tmp_path / "out")} == {"y"}

    def test_of_shards_are_refused_without_a_trace(self, tmp_path, blobs):
        for folder in ("A", "B"):
            save_maps(tmp_path / folder, [f"{name}.nii" for name in "abcd"], blobs)
        run(tmp_path / "A", tmp_path / "out", shard=(1, 2))
        with pytest.raises(ValueError, match="has the regions of"):
            run(tmp_path / "B", tmp_path / "out", shard=(1, 2))
        assert "regions" in run(tmp_path / "A", tmp_path / "out", shard=(2, 2)).summary

    def test_of_other_shards_and_beyond_the_limit_are_no_matter(self, tmp_path, blobs):
        save_maps(tmp_path / "A", ["b.nii"], blobs)
        save_maps(tmp_path / "B", ["a.nii", "b.nii"], blobs)
        run(tmp_path / "A", tmp_path / "out")
        for options in ({"limit": 1}, {"shard": (1, 2)}):
            assert len(run(tmp_path / "B", tmp_path / "out", **options).maps) == 1

    def test_are_one_map_by_a_hard_link(self, tmp_path, blobs):
        (path,) = save_maps(tmp_path, ["A/x.nii"], blobs)
        run(path, tmp_path / "out")
        (tmp_path / "B").mkdir()
        (tmp_path / "B" / "x.nii").hardlink_to(path)
        assert run(tmp_path / "B", tmp_path / "out").n_done == 1

    def test_do_not_stand_for_one_that_still_fails_or_is_missing(self, tmp_path, blobs):
        paths = save_maps(tmp_path / "top", ["sub/x.nii", "x.nii"], blobs)
        for content in (b"no map", None):
            out = tmp_path / f"out-{content}"
            paths[1].write_bytes(b"no map")
            if content is None:
                paths[1].unlink()
            run(paths, out)
            run(paths[0], out)  # is called x now
            run(paths, out)
            assert {Path(name).parent.name for name in outputs(out)} == {"sub"}

    def test_are_all_looked_at_where_several_are_called_like_volumes(self, tmp_path, blobs):
        names = ["A/a_vol-0000.nii", "A/a_vol-0001.nii", "B/a.nii", "C/a_vol-00001.nii"]
        paths = save_maps(tmp_path, names, blobs)
        nib.save(image(np.stack([blobs(), blobs(seed=1)], axis=-1)), paths[2])
        run(tmp_path / "A", tmp_path / "out")
        paths[1].unlink()
        with pytest.raises(ValueError, match="a_vol-0000 and a may be called the same"):
            run(tmp_path / "B", tmp_path / "out")
        run(tmp_path / "B", tmp_path / "other")
        assert run(tmp_path / "C", tmp_path / "other").n_done == 1  # no volume has so many digits

    def test_take_a_place_that_is_empty(self, tmp_path, blobs):
        paths = save_maps(tmp_path, ["s1/x.nii", "s2/x.nii"], blobs)
        out = tmp_path / "out"
        run(paths[0], out)
        content = paths[0].read_bytes()
        paths[0].write_bytes(b"damaged")
        run(paths[0], out)
        paths[0].write_bytes(content)
        assert run(paths[1], out).n_done == 1

    def test_are_one_map_by_another_way(self, tmp_path, blobs):
        (path,) = save_maps(tmp_path, ["s1/x.nii"], blobs)
        run(path, tmp_path / "out")
        (tmp_path / "s2").symlink_to("s1")
        assert run(tmp_path / "s2" / "x.nii", tmp_path / "out").n_done == 1


class TestSummingUp:
    def test_a_table_that_was_changed_meanwhile_is_told(self, cohort, tmp_path):
        out = tmp_path / "out"
        run(cohort, out, shard=(1, 2))
        table = next(out.rglob("*_dseg.tsv"))
        table.write_text(table.read_text().splitlines()[0] + "\n")
        with pytest.raises(OutputChangedError, match="gone, or not as it was written; run again"):
            run(cohort, out, shard=(2, 2))
        assert not (out / "regions.tsv").exists()
        run(cohort, out, shard=(1, 2))
        assert (out / "regions.tsv").exists()

    @pytest.mark.parametrize("always", [False, True])
    def test_a_process_that_is_killed_costs_nothing(self, cohort, tmp_path, monkeypatch, always):
        run(cohort, tmp_path / "calm")

        monkeypatch.setattr("gpuroi.cohort._summary.sum_up", _Killed(always))
        run(cohort, tmp_path / "out")
        assert (tmp_path / "out" / ".gpuroi" / "killed").exists()
        assert contents(tmp_path / "out") == contents(tmp_path / "calm")

    def test_all_datasets_are_named_whose_maps_are_there(self, tmp_path, blobs):
        out = tmp_path / "out"
        for name in ("one", "two"):
            save_maps(tmp_path / name, [f"sub-{name}_stat-t_statmap.nii.gz"], blobs)
            (tmp_path / name / "dataset_description.json").write_text('{"Name": "theirs"}')
            report = run(tmp_path / name, out)
        described = json.loads(report.summary["description"].read_text())
        assert [Path(one["URL"]).name for one in described["SourceDatasets"]] == ["one", "two"]

    def test_datasets_whose_maps_have_gone_are_not_named(self, tmp_path, blobs):
        save_maps(tmp_path / "d" / "A", ["x.nii", "y.nii"], blobs)
        run(tmp_path / "d" / "A", tmp_path / "out")
        (tmp_path / "d" / "A").rename(tmp_path / "d" / "B")
        run(tmp_path / "d" / "B", tmp_path / "out")
        run(tmp_path / "d" / "B", tmp_path / "fresh")
        assert contents(tmp_path / "out") == contents(tmp_path / "fresh")

    def test_datasets_whose_maps_failed_since_are_not_named(self, tmp_path, blobs):
        (path, _) = save_maps(tmp_path, ["one/x.nii", "two/y.nii"], blobs)
        run(tmp_path / "one", tmp_path / "out")
        path.write_bytes(b"no map")
        run(tmp_path / "one", tmp_path / "out")
        described = run(tmp_path / "two", tmp_path / "out").summary["description"].read_text()
        assert [Path(one["URL"]).name for one in json.loads(described)["SourceDatasets"]] == ["two"]

    def test_names_with_quotes_stay_whole(self, tmp_path, blobs):
        save_maps(tmp_path / "m", ['"a.nii', 'b"".nii', "c.nii"], blobs)
        table = pd.read_csv(run(tmp_path / "m", tmp_path / "out").summary["regions"], sep="\t")
        assert set(table["map"]) == {'"a', 'b""', "c"}


class _Killed:
    """Sums up in a process that is killed, once for each folder or always."""

    def __init__(self, always):
        self._always = always

    def __call__(self, tools, unit):
        marker = tools.job.folder / ".gpuroi" / "killed"
        if self._always or not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return _tasks.sum_up(tools, unit)


class TestPages:
    @pytest.fixture
    def report(self, cohort, tmp_path, monkeypatch):
        monkeypatch.setattr("gpuroi.report._report.MOST_EMBEDDED", 3)
        report = run(cohort, tmp_path / "out")
        write_report(report)
        return report

    def test_nobody_writes_meanwhile(self, report, monkeypatch):
        def begin_another(*_):
            with pytest.raises(FolderInUseError, match="is in use by another run"):
                run(report.maps[0].source, report.folder)
            return iter(())

        monkeypatch.setattr("gpuroi.cohort._results.read_results", begin_another)
        write_report(report)

    def test_nobody_is_disturbed(self, report):
        with Ledger(report.folder, (1, 2)), pytest.raises(FolderInUseError):
            write_report(report)

    def test_are_of_one_run(self, report, cohort):
        run(cohort, report.folder, OTHER)
        with pytest.raises(OutputChangedError, match="another run has worked on maps of "):
            write_report(report)

    def test_leave_nothing_of_those_before(self, report, cohort):
        data = report.folder / "report_data"
        assert len(list(data.iterdir())) == 12
        (data / ".0002.js.4711-0a1b2c3d.tmp").touch()
        (report.folder / ".report.html.4711-0a1b2c3d.tmp").touch()
        few = run(cohort, report.folder, limit=3)
        assert not list(report.folder.rglob("*.tmp"))
        write_report(few)
        assert (report.folder / "report.html").exists()
        assert not data.exists()

    def test_leave_files_of_others(self, report, cohort):
        theirs = report.folder / "report_data" / "mine.txt"
        theirs.touch()
        run(cohort, report.folder, OTHER)
        assert list(theirs.parent.iterdir()) == [theirs]

    def test_take_no_folder_of_others(self, cohort, tmp_path):
        (tmp_path / "out" / "report_data").mkdir(parents=True)
        with pytest.raises(ValueError, match="report_data is there already, and not of gpuroi"):
            run(cohort, tmp_path / "out")


class TestTemporaryFiles:
    """Of the operating system: sockets of processes, in TMPDIR."""

    def test_a_place_where_none_can_be_is_told(self, cohort, tmp_path, monkeypatch):
        def full(self):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("multiprocessing.context.ForkServerProcess.start", full)
        with pytest.raises(
            WorkerDiedError, match=r"No space left on device\); the folder for temp"
        ):
            run(cohort, tmp_path / "out")


class _Blaming:
    """An engine of which all units die that are there when job 4 kills, as on a Dask worker."""

    knows_who_killed = False

    def run(self, task, units):
        units = list(units)
        is_deadly = any(4 in unit for unit in units)
        for unit in units:
            yield unit, WorkerDiedError("killed") if is_deadly else [job**2 for job in unit]


@pytest.mark.parametrize("unit_size", [1, 3])
def test_only_what_kills_is_lost_whoever_is_blamed(unit_size):
    outcomes = dict(each_outcome(_Blaming(), None, range(6), unit_size))
    assert isinstance(outcomes.pop(4), WorkerDiedError)
    assert outcomes == {job: job**2 for job in (0, 1, 2, 3, 5)}


def test_a_process_that_dies_idle_costs_no_map(cohort, tmp_path):
    run(cohort, tmp_path / "out")
    changed = sorted(cohort.rglob("*.nii.gz"))[:3]
    for path in changed:
        os.utime(path)

    def kill_one(progress):
        if progress.latest is None:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
                child.join()

    report = extract_cohort(cohort, tmp_path / "out", RECIPE, jobs=2, on_progress=kill_one)
    assert (report.n_done, report.n_skipped, report.failures) == (3, 9, ())


class TestLeftovers:
    def test_go_with_what_they_were_to_replace(self, tmp_path, blobs):
        paths = save_maps(tmp_path / "m", ["x.nii", "y.nii"], blobs)
        out = tmp_path / "out"
        run(tmp_path / "m", out)
        with Ledger(out, None) as ledger:
            ledger.begin("x")
        (out / "x_desc-regions_dseg.nii.gz").write_bytes(b"of other parameters")
        paths[0].unlink()
        run(tmp_path / "m", out)
        assert {name[0] for name in outputs(out)} == {"y"}

    def test_go_though_their_map_has_gone(self, tmp_path, blobs):
        paths = save_maps(tmp_path / "m", ["x.nii", "y.nii"], blobs)
        out = tmp_path / "out"
        run(paths[1], out)
        with Ledger(out, None) as ledger:
            ledger.begin("x")
        for name in ("x_desc-regions_dseg.nii.gz", ".x_desc-regions_dseg.tsv.4711-0a1b2c3d.tmp"):
            (out / name).touch()
        paths[0].unlink()
        run(tmp_path / "m", out)
        assert not [name for name in contents(out) if "x_" in name]
        theirs = out / "x_desc-regions_dseg.nii.gz"
        theirs.touch()  # later, by hand
        run(tmp_path / "m", out)
        assert theirs.exists()


class TestClusters:
    @pytest.fixture(scope="class")
    def client(self):
        options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
        with (
            distributed.LocalCluster(**options, silence_logs=50) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield client

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    def test_what_they_cannot_do_is_told_before_anything_is_done(self, client, cohort, tmp_path):
        before = contents(run(cohort, tmp_path / "out").folder)
        with pytest.raises(UnknownBackendError, match="'foo' is unknown"):
            extract_cohort(cohort, tmp_path / "out", OTHER, client=client, backend="foo")
        client.run(_pretend_to_be, "9.9.9")
        try:
            with pytest.raises(
                RuntimeError, match=r"has started the run, and a worker has gpuroi 9"
            ):
                extract_cohort(cohort, tmp_path / "out", OTHER, client=client)
        finally:
            client.run(_pretend_to_be, gpuroi.__version__)
        assert contents(tmp_path / "out") == before

    def test_a_worker_that_outlives_its_run_writes_nothing(self, cohort, tmp_path):
        out = tmp_path / "out"
        jobs = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_run, "Tools", lambda job: jobs.append(job) or _tasks.Tools(job))
            run(sorted(cohort.rglob("*.nii.gz"))[0], out)
        tools = _tasks.Tools(jobs[0])
        (one,) = run(sorted(cohort.rglob("*.nii.gz"))[1], out).maps
        before = contents(out)
        with pytest.raises(FolderInUseError, match="another run, which has begun since"):
            _tasks.extract(tools, (replace(one, stem="other"),))
        assert contents(out) == before

    def test_a_worker_stops_in_the_middle_of_a_series(self, tmp_path, blobs, monkeypatch):
        data = np.stack([blobs(seed=seed) for seed in range(4)], axis=-1)
        nib.save(image(data), tmp_path / "x.nii")
        add = _tasks.Written.add

        def begin_another(written, name, regions):
            add(written, name, regions)
            for path in (tmp_path / "out" / ".gpuroi").glob("*.run"):
                path.write_text("another")

        monkeypatch.setattr(_tasks.Written, "add", begin_another)
        with pytest.raises(FolderInUseError, match="another run, which has begun since"):
            run(tmp_path / "x.nii", tmp_path / "out")
        assert {name[:10] for name in outputs(tmp_path / "out")} == {"x_vol-0000"}


def _pretend_to_be(version):
    gpuroi.__version__ = version

"""Cohorts: one run after another, or beside it, in the same folder."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import distributed
import pandas as pd
import pytest

import gpuroi
from gpuroi.cohort import _run, _tasks, extract_cohort, write_report
from gpuroi.cohort._ledger import Ledger
from gpuroi.errors import FolderInUseError, OutputChangedError, UnknownBackendError, WorkerDiedError
from tests.cohort_files import RECIPE, contents, save_maps

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


def _pretend_to_be(version):
    gpuroi.__version__ = version

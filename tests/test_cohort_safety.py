"""Cohorts: what is not to be lost, whoever wrote it, and what is not to be believed."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import joblib
import nibabel as nib
import numpy as np
import pandas as pd
import pytest

import gpuroi
from gpuroi.cohort import _run, _summary, extract_cohort, write_report
from gpuroi.cohort._ledger import Ledger
from gpuroi.cohort._processes import CONTEXT, Processes
from gpuroi.errors import OutputChangedError, WorkerDiedError
from tests.cohort_files import RECIPE, contents, ledger_of, save_maps
from tests.conftest import image

OTHER = RECIPE | {"threshold": "95%"}


def run(inputs, out, recipe=RECIPE, **options):
    return extract_cohort(inputs, out, recipe, jobs=1, **options)


def maps_of(report):
    return sorted(set(pd.read_csv(report.summary["regions"], sep="\t")["map"]))


class TestFilesOfOthers:
    @pytest.mark.parametrize("name", ["overlap.nii.gz", "a_desc-regions_dseg.nii.gz"])
    @pytest.mark.parametrize("link", [False, True])
    def test_no_map_is_replaced_by_an_output(self, tmp_path, blobs, name, link):
        paths = save_maps(tmp_path / "m", [name, "a.nii.gz"], blobs)
        before = contents(tmp_path / "m")
        out = tmp_path / "m"
        if link:
            out = tmp_path / "link"
            out.symlink_to("m")
        with pytest.raises(ValueError, match=f"{name} would be replaced by an output; write to an"):
            run(paths, out)
        assert contents(tmp_path / "m") == before

    def test_nor_one_that_a_link_leads_to(self, tmp_path, blobs):
        (path,) = save_maps(tmp_path / "out", ["x_desc-regions_dseg.nii.gz"], blobs)
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "x.nii.gz").symlink_to(path)
        with pytest.raises(ValueError, match=r"m/x\.nii\.gz would be replaced by an output"):
            run(tmp_path / "m", tmp_path / "out")
        (theirs,) = save_maps(tmp_path / "m2" / "sub", ["a_desc-regions_dseg.nii.gz"], blobs)
        save_maps(tmp_path / "m3" / "sub", ["a.nii.gz"], blobs)
        (tmp_path / "out" / "sub").symlink_to(theirs.parent)
        with pytest.raises(ValueError, match="would be replaced by an output"):
            run([tmp_path / "m3", theirs], tmp_path / "out")

    def test_nor_a_mask(self, cohort, tmp_path):
        mask = tmp_path / "out" / "group-0" / "sub-00_tmap_desc-regions_dseg.nii.gz"
        mask.parent.mkdir(parents=True)
        nib.save(image(np.ones((12, 13, 14), np.uint8)), mask)
        for parameter in ("mask_img", "population"):
            with pytest.raises(ValueError, match=r"dseg\.nii\.gz would be replaced by an output"):
                run(cohort, tmp_path / "out", RECIPE | {parameter: mask})

    @pytest.mark.parametrize(
        "name", ["regions.tsv", "overlap.nii.gz", "failures.tsv", "report.html"]
    )
    @pytest.mark.parametrize("dangling", [False, True])
    def test_nothing_that_gpuroi_has_not_written(self, cohort, tmp_path, name, dangling):
        path = tmp_path / "out" / name
        path.parent.mkdir()
        if dangling:  # as git-annex leaves it where there is no content
            path.symlink_to("not-fetched")
        else:
            path.write_text("theirs")
        with pytest.raises(ValueError, match=f"{name} is there already, and not of gpuroi"):
            run(cohort, tmp_path / "out")
        assert path.is_symlink() or path.read_text() == "theirs"
        path.unlink()
        for _ in range(2):  # of gpuroi's, everything is replaced
            assert len(run(cohort, tmp_path / "out").maps) == 12

    def test_no_description_that_is_not_there_to_be_read(self, cohort, tmp_path):
        path = tmp_path / "out" / "dataset_description.json"
        path.parent.mkdir()
        path.symlink_to("not-fetched")
        run(cohort, tmp_path / "out")
        assert path.is_symlink()

    def test_what_a_person_adds_to_the_description_stays(self, cohort, tmp_path):
        path = run(cohort, tmp_path / "out").summary["description"]
        described = json.loads(path.read_text())
        path.write_text(json.dumps(described | {"Name": "mine", "License": "CC0"}))
        run(cohort, tmp_path / "out", OTHER)
        assert json.loads(path.read_text()) == described | {"Name": "mine", "License": "CC0"}

    def test_no_results_that_were_saved_by_hand_before_they_are_replaced(self, tmp_path, blobs):
        names = [f"m{number}.nii.gz" for number in range(4)]
        out = tmp_path / "out"
        for path in save_maps(tmp_path / "m", names, blobs):
            regions = gpuroi.extract_regions(path, "80%")
            regions.save(out / f"{path.name[:2]}_desc-regions_dseg")
            regions.save(out / f"{path.name[:2]}_vol-0001_desc-regions_dseg")
        for path in out.iterdir():
            os.utime(path, (0, 0))

        def stop(progress):
            if progress.latest is not None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "m", out, on_progress=stop)
        (tmp_path / "m" / "m3.nii.gz").write_bytes(b"damaged")
        run(tmp_path / "m", out)
        kept = {name[:11] for name in contents(out) if name.endswith("dseg.tsv")}
        assert kept >= {f"m{number}_vol-0001" for number in range(4)}
        assert (out / "m3_desc-regions_dseg.tsv").exists()

    def test_temporary_files_of_other_shards(self, cohort, tmp_path):
        theirs = tmp_path / "out" / "group-0" / ".sub-02_tmap_desc-regions_dseg.tsv.1-0a1b2c3d.tmp"
        theirs.parent.mkdir(parents=True)
        theirs.touch()
        run(cohort, tmp_path / "out", shard=(1, 2))
        assert theirs.exists()
        run(cohort, tmp_path / "out", shard=(2, 2))
        assert not theirs.exists()

    def test_outputs_of_a_map_that_is_called_as_a_volume_of_a_lost_one(
        self, tmp_path, blobs, monkeypatch
    ):
        paths = save_maps(tmp_path / "m", ["b_vol-0001.nii.gz", "b.nii.gz"], blobs)
        run(paths[0], tmp_path / "out")
        paths[0].unlink()

        def killed(engine, task, jobs, unit_size):
            for job in jobs:
                yield job, WorkerDiedError("killed")

        monkeypatch.setattr(_run, "each_outcome", killed)
        assert len(run(paths[1], tmp_path / "out").failures) == 1
        assert (tmp_path / "out" / "b_vol-0001_desc-regions_dseg.tsv").exists()


SCRIPT = """
import sys
from gpuroi.cohort import extract_cohort
extract_cohort(sys.argv[1:-1], sys.argv[-1], {"threshold": "90%", "min_region_size": 20}, jobs=2)
"""


@pytest.mark.slow
def test_processes_end_when_the_run_is_killed(tmp_path, blobs):
    """The next run is not to find them writing: the lock is gone with their parent."""
    volumes = [blobs((24, 26, 28), seed=seed) for seed in range(20)]
    for name in ("a", "b"):
        series = np.stack(volumes * 100, axis=-1)
        nib.save(image(series), tmp_path / f"{name}.nii")
    out = tmp_path / "out"
    arguments = ["-c", SCRIPT, str(tmp_path / "a.nii"), str(tmp_path / "b.nii"), str(out)]
    process = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(out.glob("*.tsv"))) < 10:
        time.sleep(0.01)
    process.kill()
    process.wait()
    time.sleep(0.5)
    n_then = len(contents(out))
    assert 0 < n_then < 3 * 2 * len(volumes) * 100  # they had not ended by themselves
    time.sleep(1.5)
    assert len(contents(out)) == n_then


class TestAfterAKill:
    def kill_before_the_last_line(self, out):
        ledger = out / ".gpuroi" / "ledger.jsonl"
        ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))

    def test_a_map_that_fails_then_has_no_files(self, tmp_path, blobs):
        (path,) = save_maps(tmp_path / "m", ["a.nii.gz"], blobs)
        run(path, tmp_path / "out")
        self.kill_before_the_last_line(tmp_path / "out")
        path.write_bytes(b"damaged")
        assert len(run(path, tmp_path / "out").failures) == 1
        assert not [name for name in contents(tmp_path / "out") if name.startswith("a_")]

    def test_a_series_that_is_shorter_then_has_its_files_alone(self, tmp_path, blobs):
        path = tmp_path / "a.nii.gz"
        series = np.stack([blobs(seed=seed) for seed in range(3)], axis=-1)
        for is_known in (False, True):
            for n_volumes in (1, 3, 2):
                nib.save(image(series[..., :n_volumes]), path)
                run(path, tmp_path / "out")
                if n_volumes == 3 or not is_known:
                    self.kill_before_the_last_line(tmp_path / "out")
                names = [name for name in contents(tmp_path / "out") if name.startswith("a_")]
                assert len(names) == 3 * n_volumes

    def test_clocks_of_other_machines_may_be_ahead(self, cohort, tmp_path):
        out = tmp_path / "out"
        run(cohort, out)
        ledger = out / ".gpuroi" / "ledger.jsonl"
        records = ledger_of(out)
        for record in records:
            record["written_ns"] += 600 * 10**9
        (out / ".gpuroi" / "ledger-1of1.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records)
        )
        ledger.unlink()
        report = run(cohort, out, OTHER)
        assert report.n_done == 12
        assert len(maps_of(report)) == 12
        assert run(cohort, out, OTHER).n_skipped == 12


class TestShards:
    def test_one_that_ended_long_ago_has_not_ended(self, cohort, tmp_path):
        out = tmp_path / "out"
        for shard in [(1, 2), (2, 2)]:
            run(cohort, out, shard=shard)
        run(cohort, out, OTHER)
        assert run(cohort, out, shard=(1, 2)).summary == {}
        assert len(maps_of(run(cohort, out, shard=(2, 2)))) == 12

    def test_of_other_limits_have_not_ended(self, cohort, tmp_path):
        run(cohort, tmp_path / "out", shard=(1, 2), limit=1)
        assert run(cohort, tmp_path / "out", shard=(2, 2), limit=2).summary == {}
        assert len(maps_of(run(cohort, tmp_path / "out", shard=(2, 2), limit=1))) == 2

    def test_none_begins_while_another_sums_up(self, tmp_path):
        begun = threading.Event()

        def begin():
            with Ledger(tmp_path, (2, 2)):
                begun.set()

        with Ledger(tmp_path, (2, 2)) as second, second.last_of_shards("work"):
            pass
        with Ledger(tmp_path, (1, 2)) as first:
            with first.last_of_shards("work") as is_last:
                assert is_last
                thread = threading.Thread(target=begin)
                thread.start()
                assert not begun.wait(0.5)
            assert begun.wait(10)
            thread.join()

    def test_what_is_gone_when_it_is_summed_up_is_told(self, cohort, tmp_path, monkeypatch):
        out = tmp_path / "out"
        write_summary = _run.write_summary

        def too_late(*arguments):
            next(out.rglob("*_dseg.tsv")).unlink()
            return write_summary(*arguments)

        monkeypatch.setattr(_run, "write_summary", too_late)
        with pytest.raises(
            OutputChangedError, match=r"^an output of \S+ is gone, or not as it was written; run"
        ):
            run(cohort, out)


class TestSummaries:
    def test_are_in_the_order_of_names_whichever_part_ends_first(
        self, cohort, tmp_path, monkeypatch
    ):
        each_outcome = _summary.each_outcome
        expected = run(cohort, tmp_path / "out").summary["regions"].read_bytes()

        def backwards(*arguments):
            return reversed(list(each_outcome(*arguments)))

        monkeypatch.setattr(_summary, "_MAPS_A_SUM", 2)
        monkeypatch.setattr(_summary, "each_outcome", backwards)
        assert run(cohort, tmp_path / "out").summary["regions"].read_bytes() == expected

    def test_are_of_the_maps_below_the_limit(self, cohort, tmp_path):
        assert len(maps_of(run(cohort, tmp_path / "out"))) == 12
        assert len(maps_of(run(cohort, tmp_path / "out", limit=3))) == 3

    def test_a_failure_is_a_line(self, tmp_path, blobs):
        save_maps(tmp_path / "m", ["a.nii.gz"], blobs)
        names = [tmp_path / "m" / "a.nii.gz", tmp_path / "m" / "no\nsuch\t  ma  p.nii"]
        report = run(names, tmp_path / "out")
        (header, row) = report.summary["failures"].read_text().splitlines()
        assert header == "source\terror\tmessage"
        assert row.split("\t")[:2] == [f"{tmp_path}/m/no such ma  p.nii", "InvalidMapError"]

    def test_failures_of_a_run_before_go_when_one_begins(self, cohort, tmp_path):
        def stop(progress):
            raise KeyboardInterrupt

        out = tmp_path / "out"
        run([cohort, cohort / "none.nii"], out)
        assert (out / "failures.tsv").exists()
        with pytest.raises(KeyboardInterrupt):
            run(cohort, out, OTHER, on_progress=stop)
        assert (out / "failures.tsv").exists()  # it had not begun
        with pytest.raises(KeyboardInterrupt):
            run(cohort, out, OTHER, on_progress=lambda progress: progress.latest and stop(progress))
        assert not (out / "failures.tsv").exists()


def test_a_page_is_written_from_wherever_the_caller_is(tmp_path, blobs, monkeypatch):
    save_maps(tmp_path / "m", ["a.nii.gz", "b.nii.gz"], blobs)
    monkeypatch.chdir(tmp_path)
    report = run("m", "out")
    assert (
        repr(report) == f"CohortReport(2 maps in '{tmp_path}/out': 2 done, 0 done before, 0 failed)"
    )
    monkeypatch.chdir("/")
    assert write_report(report) == tmp_path / "out" / "report.html"


class TestParameters:
    def test_another_version_does_all_again(self, cohort, tmp_path, monkeypatch):
        run(cohort, tmp_path / "out")
        monkeypatch.setattr(gpuroi, "__version__", "another")
        monkeypatch.setattr(_run, "can_start", lambda: False)  # processes have the old one
        assert run(cohort, tmp_path / "out").n_done == 12

    def test_a_mask_is_its_voxels_in_space_by_whatever_path(self, cohort, tmp_path, monkeypatch):
        mask = np.ones((12, 13, 14), np.uint8)
        nib.save(image(mask), tmp_path / "mask.nii")
        monkeypatch.chdir(tmp_path)
        for parameter in ("mask_img", "population"):
            out = tmp_path / f"out-{parameter}"
            first = run(cohort, out, RECIPE | {parameter: "mask.nii"})
            for path in (tmp_path / "mask.nii", Path("../") / tmp_path.name / "mask.nii"):
                assert run(cohort, out, RECIPE | {parameter: path}).n_skipped == 12
            assert first.n_done == 12
        moved = nib.Nifti1Image(mask, np.diag([2.0, 2.0, 2.0, 1.0]))
        report = run(cohort, out, RECIPE | {"population": moved, "resample_mask": True})
        assert report.n_skipped == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"jobs": 2.5}, "jobs=2.5 is a float; pass a number of processes >= 1"),
            ({"batch_size": True}, "batch_size=True is a bool"),
            ({"recipe": "97%"}, "recipe='97%' is a str; pass a mapping such as"),
            ({"recipe": {"treshold": 3}}, "no parameter 'treshold'; did you mean 'threshold'"),
            ({"recipe": {"xyz": 3}}, "no parameter 'xyz'; there are threshold, tail, "),
        ],
    )
    def test_wrong_types_and_names_are_told(self, cohort, tmp_path, options, message):
        with pytest.raises(TypeError, match=message):
            extract_cohort(cohort, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


class TestProcesses:
    @pytest.mark.parametrize("kind", ["fork", "spawn", "loky"])
    def test_there_are_none_in_a_process_of_a_pool(self, cohort, tmp_path, kind):
        where = (str(cohort), str(tmp_path / "out"))
        if kind == "loky":
            (n_done,) = joblib.Parallel(2)(joblib.delayed(_n_done)(*one) for one in [where])
        else:
            with multiprocessing.get_context(kind).Pool(1) as pool:
                n_done = pool.apply(_n_done, where)
        assert n_done == 12

    @pytest.mark.skipif(not hasattr(signal, "SIGRTMIN"), reason="signals without names")
    def test_one_may_be_ended_by_a_signal_without_a_name(self):
        with Processes(1, str, ()) as engine:
            ((_, death),) = engine.run(_end_by_signal, [(int(signal.SIGRTMIN) + 2,)])
        assert str(death).endswith(f"ended (signal {signal.SIGRTMIN + 2}).")

    def test_the_main_module_is_back_whoever_else_starts_processes(self):
        main_module = sys.modules["__main__"]

        def start():
            with Processes(1, str, ()) as engine:
                list(engine.run(_nothing, [(1,)]))

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sys.modules["__main__"] is main_module

    @pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals of POSIX")
    def test_an_interrupt_waits_until_a_process_is_there(self, monkeypatch):
        blocked = []
        start = CONTEXT.Process.start

        def watched(process):
            blocked.append(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))
            start(process)

        monkeypatch.setattr(CONTEXT.Process, "start", watched)
        with Processes(1, str, ()) as engine:
            list(engine.run(_nothing, [(1,)]))
        assert blocked == [True]
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def _n_done(inputs, out):
    return extract_cohort(inputs, out, RECIPE, jobs=2).n_done


def _end_by_signal(tools, unit):
    os.kill(os.getpid(), unit[0])
    time.sleep(10)


def _nothing(tools, unit):
    return [os.getpid()] * len(unit)

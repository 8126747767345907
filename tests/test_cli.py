"""The command line: what it writes, what it says, and its exit codes."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from nilearn.image import threshold_img
from nilearn.regions import connected_regions
from typer.testing import CliRunner

import gpuroi
from gpuroi import backends, cli
from gpuroi.cli import _screen, _watch
from gpuroi.cohort import CohortReport, Progress, extract_cohort
from gpuroi.cohort._ledger import Ledger, Record
from gpuroi.datasets import load_sample_motor_activation_image
from gpuroi.pipeline import Finder

# Two regions: 27 voxels of 5 and 8 voxels of -6, of 27 mm^3 each.
DATA = np.zeros((12, 12, 12), np.float32)
DATA[2:5, 2:5, 2:5] = 5.0
DATA[7:9, 7:9, 7:9] = -6.0
AFFINE = np.diag([3.0, 3.0, 3.0, 1.0])

BOTH = ("--threshold", "3.0", "--min-region-size", "0")  # finds the two

# Runs a command in a process of its own, as the installed script does.
IN_A_PROCESS = (sys.executable, "-c", "from gpuroi.cli import main; main()")


# The last line of a run that went well.
SENTENCE = re.compile(r"1 map: 1 done, |[\d,]+ maps: [\d,]+ done, ")

# What is said where nothing is found.
LARGEST = "the largest magnitude is {}."
NEEDS_ITS_SIGN = " A percentile needs its percent sign: 97%."
TOO_SMALL = "voxels at the cut-off fill no region of {} mm³ (--min-region-size)."


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    """Work in `tmp_path`, on the CPU, before a wide terminal without colours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPUROI_BACKEND", "cpu")
    for name in ("COLUMNS", "TERMINAL_WIDTH"):
        monkeypatch.setenv(name, "200")
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)


def write_map(name, data=DATA, affine=AFFINE):
    nib.Nifti1Image(data, affine).to_filename(name)
    return name


def run(*arguments, report=False):
    """Return the result of a command; an exception that it does not handle fails the test.

    The report, which would come by default, is for the tests that ask for it.
    """
    if arguments[:1] == ("extract",) and not report:
        arguments = (*arguments, "--no-report")
    return CliRunner().invoke(cli.app, [str(one) for one in arguments], catch_exceptions=False)


def plain(said):
    """Return `said` without the colours that typer uses where it believes in a terminal."""
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", said)


def succeed(*arguments, report=False):
    """Return what a command prints when all goes well, which is one sentence at most on stderr."""
    result = run(*arguments, report=report)
    assert result.exit_code == 0
    if arguments[0] == "extract" and arguments[1] != "--help":
        assert SENTENCE.match(result.stderr)
        assert result.stderr.count("\n") == 1
    else:
        assert result.stderr == ""
    return plain(result.stdout)


def complaints(result):
    """Return what stands on stderr before the sentence that ends a run, and that sentence."""
    *lines, last = plain(result.stderr).splitlines()
    return lines, re.sub(r", \d+ s$", "", last)


def read_labels(path):
    return np.asanyarray(nib.load(path).dataobj)


def written(folder="out"):
    return sorted(path.name for path in Path(folder).iterdir())


def files_of(*stems):
    return [
        f"{stem}_desc-regions_dseg{extension}"
        for stem in sorted(stems)
        for extension in (".json", ".nii.gz", ".tsv")
    ]


def outputs(*stems, others=()):
    """Return all names that a run on maps of one grid leaves in its folder."""
    of_several = ("regions.tsv", "overlap.nii.gz") if len(stems) > 1 else ()
    return sorted([*files_of(*stems), ".gpuroi", "dataset_description.json", *of_several, *others])


def contents(folder="out"):
    """Return the bytes of all files of a folder, but for the ledger."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file() and ".gpuroi" not in path.parts
    }


class TestExtract:
    def test_the_sample_from_end_to_end(self):
        said = succeed("extract", "--sample", "-o", "out", report=True)
        prefix = "out/image_10426_desc-regions_dseg"
        assert f"{prefix}.nii.gz: 6 regions of at least 1500 mm³ at |value| > 2.59467 " in said
        assert said.endswith("The report is out/report.html\n")
        assert written() == outputs("image_10426", others=["report.html"])

        sample = load_sample_motor_activation_image()
        stack, _ = connected_regions(
            threshold_img(sample, "97%"), min_region_size=1500, extract_type="connected_components"
        )
        foreground = (stack.get_fdata() != 0).any(axis=-1)
        labels = read_labels(f"{prefix}.nii.gz")
        np.testing.assert_array_equal(labels != 0, foreground)
        table = pd.read_csv(f"{prefix}.tsv", sep="\t")
        assert table["voxels"].tolist() == [2520, 404, 433, 67, 802, 56]
        assert np.bincount(labels.ravel())[1:].tolist() == table["voxels"].tolist()
        for row in table.itertuples():
            assert re.search(rf"│ +{row.index} │ +{row.voxels} │ +{row.volume_mm3:.0f} │", said)
        provenance = json.loads(Path(f"{prefix}.json").read_text())
        assert provenance["source"] == sample
        assert provenance["parameters"]["min_region_size"] == 1500

    def test_a_table_of_the_regions(self):
        said = succeed("extract", write_map("m.nii"), *BOTH, "-o", "out")
        heading, *table = said.splitlines()
        assert heading == (
            "out/m_desc-regions_dseg.nii.gz: 2 regions of at least 0 mm³ at |value| ≥ 3 "
            "(threshold 3, cpu)"
        )
        rows = [re.split(r" *│ *", line)[1:-1] for line in table if line.startswith("│")]
        assert rows == [
            ["1", "27", "729", "5.00", "6.0 6.0 6.0", "5.00", ""],
            ["2", "8", "216", "-6.00", "21.0 21.0 21.0", "-6.00", ""],
        ]

    def test_several_maps_are_each_what_they_are_alone(self):
        for name, scale in (("a.nii", 1), ("b.nii.gz", 2), ("c.nii", -1)):
            write_map(name, DATA * scale)
            succeed("extract", name, *BOTH, "-o", "alone")
        succeed("extract", "a.nii", "b.nii.gz", "c.nii", *BOTH, "-o", "out")
        assert written("out") == outputs("a", "b", "c")
        alone = [name for name in written("out") if name not in ("overlap.nii.gz", "regions.tsv")]
        assert written("alone") == alone  # what is of several maps is of those that are named
        for name in alone[1:]:  # of the ledger, the order of lines is that of the ends
            assert (Path("out") / name).read_bytes() == (Path("alone") / name).read_bytes()

    def test_volumes_of_a_series_have_a_number_each(self):
        series = np.stack([DATA, np.zeros_like(DATA), np.abs(DATA)], axis=-1)
        said = succeed("extract", write_map("s.nii.gz", series), *BOTH, "-o", "out")
        assert written() == outputs("s_vol-0000", "s_vol-0001", "s_vol-0002")
        headings = [line for line in said.splitlines() if line.startswith("out/")]
        assert [heading.split()[1] for heading in headings] == ["2", "0", "2"]
        signs = [
            pd.read_csv(f"out/s_vol-000{volume}_desc-regions_dseg.tsv", sep="\t")["sign"].tolist()
            for volume in range(3)
        ]
        assert signs == [[1, -1], [], [1, 1]]
        provenance = json.loads(Path("out/s_vol-0002_desc-regions_dseg.json").read_text())
        assert provenance["source"] == str(Path("s.nii.gz[2]").absolute())

    def test_a_series_of_one_has_none(self):
        succeed("extract", write_map("s.nii", DATA[..., np.newaxis]), *BOTH, "-o", "out")
        assert written() == outputs("s")

    @pytest.mark.parametrize(
        ("options", "signs", "cutoff"),
        [
            (BOTH, [1, -1], 3),
            (("--threshold", "5.5", "--min-region-size", "0"), [-1], 5.5),
            (("--threshold", "5", "--min-region-size", "216"), [1, -1], 5),
            (("--threshold", "5", "--min-region-size", "216.1"), [1], 5),
            ((*BOTH, "--tail", "positive"), [1], 3),
            ((*BOTH, "--tail", "negative"), [-1], 3),
            ((*BOTH, "--connectivity", "26"), [1, -1], 3),
            (
                ("--threshold", "50%", "--population", "nonzero", "--min-region-size", "0"),
                [-1],
                float(np.nextafter(np.float32(5), np.float32(6))),
            ),
        ],
    )
    def test_options_reach_the_recipe(self, options, signs, cutoff):
        succeed("extract", write_map("m.nii"), *options, "-o", "out")
        table = pd.read_csv("out/m_desc-regions_dseg.tsv", sep="\t")
        assert table["sign"].tolist() == signs
        provenance = json.loads(Path("out/m_desc-regions_dseg.json").read_text())
        assert provenance["cutoff"] == cutoff

    def test_a_percentile_of_zeros_is_warned_of(self):
        result = run("extract", write_map("m.nii"), "--threshold", "90%", "-o", "out")
        assert "m.nii: at least 90% of the voxels ranked are zero, so that all others" in (
            result.stderr
        )

    def test_a_mask_that_fits_no_map_is_told_once(self):
        write_map("mask.nii", np.arange(12.0**3).reshape(12, 12, 12))
        result = run("extract", write_map("m.nii"), write_map("n.nii"), "--mask", "mask.nii")
        assert result.exit_code == 2
        assert result.stderr.startswith("error: --mask mask.nii has 1727 values besides 0")
        assert not Path("regions-out").exists()

    def test_connectivity_joins_corners_when_asked(self):
        data = np.zeros_like(DATA)
        data[1, 1, 1] = data[2, 2, 2] = 4.0
        write_map("m.nii", data)
        for connectivity, n_regions in ((6, "2"), (18, "2"), (26, "1")):
            said = succeed("extract", "m.nii", *BOTH, "--connectivity", connectivity)
            assert said.split()[1] == n_regions
        assert written("regions-out") == outputs("m")  # the folder where none is named

    def test_again_gives_the_same_bytes(self):
        write_map("m.nii.gz")
        runs = []
        for folder in ("one", "other"):
            said = succeed("extract", "m.nii.gz", "--sample", *BOTH, "-o", folder)
            runs.append((said.replace(folder, "out"), contents(folder)))
        assert runs[0] == runs[1]
        assert len(runs[0][1]) == 8

    def test_old_files_are_replaced_and_others_left(self):
        write_map("m.nii")
        Path("out").mkdir()
        for name in ("m_desc-regions_dseg.tsv", "notes.txt"):
            (Path("out") / name).write_text("old")
        succeed("extract", "m.nii", *BOTH, "-o", "out")
        assert written() == outputs("m", others=["notes.txt"])
        assert Path("out/m_desc-regions_dseg.tsv").read_text().startswith("index\tname\t")
        assert Path("out/notes.txt").read_text() == "old"

    @pytest.mark.parametrize(
        ("name", "stem"),
        [
            ("m.nii", "m"),
            ("M.NII.GZ", "M"),
            ("sub-01.run-1.nii.gz", "sub-01.run-1"),
            ("zstat_3.1", "zstat_3.1"),
        ],
    )
    def test_outputs_are_named_after_the_map(self, name, stem):
        Path(write_map("m.nii")).rename(name)
        succeed("extract", name, *BOTH, "-o", "out")
        assert written() == outputs(stem)

    def test_home_is_expanded_in_the_output(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        succeed("extract", write_map("m.nii"), *BOTH, "--output=~/out")
        assert written("home/out") == outputs("m")
        assert not Path("~").exists()


class TestMasks:
    @pytest.fixture(autouse=True)
    def _map(self):
        write_map("m.nii")

    def test_voxels_outside_are_background(self):
        write_map("mask.nii", (DATA > 0).astype(np.uint8))
        succeed("extract", "m.nii", *BOTH, "--mask", "mask.nii", "-o", "out")
        labels = read_labels("out/m_desc-regions_dseg.nii.gz")
        np.testing.assert_array_equal(labels, DATA > 0)

    def test_a_population_may_be_a_mask(self):
        write_map("mask.nii", (DATA > 0).astype(np.uint8))
        options = ("--threshold", "50%", "--min-region-size", "0", "--population", "mask.nii")
        succeed("extract", "m.nii", *options, "-o", "out")
        provenance = json.loads(Path("out/m_desc-regions_dseg.json").read_text())
        assert (provenance["percentile_score"], provenance["voxels_ranked"]) == (5.0, 27)
        assert provenance["parameters"]["population"] == str(Path("mask.nii").absolute())

    def test_another_grid_must_be_asked_for(self):
        mask = np.zeros((6, 6, 6), np.uint8)
        mask[:3] = 1
        write_map("mask.nii", mask, np.diag([6.0, 6.0, 6.0, 1.0]))
        command = ("extract", "m.nii", *BOTH, "--mask", "mask.nii", "-o", "out")
        result = run(*command)
        assert result.exit_code == 1
        assert "m.nii: --mask mask.nii is on another grid than the map: " in result.stderr
        assert "shape (6, 6, 6) against (12, 12, 12)" in result.stderr
        assert written() == outputs(others=["failures.tsv"])
        result = run(*command, "--resample-mask", "--retry-failed")
        assert result.exit_code == 0
        labels = read_labels("out/m_desc-regions_dseg.nii.gz")
        np.testing.assert_array_equal(labels, DATA > 0)


class TestSaid:
    @pytest.mark.parametrize(
        ("scale", "options", "explanation"),
        [
            (1, ("--threshold", "97"), LARGEST.format(6) + NEEDS_ITS_SIGN),
            (1, ("--threshold", "inf"), LARGEST.format(6) + NEEDS_ITS_SIGN),
            (1, ("--threshold", "99%"), TOO_SMALL.format(1500)),
            (1, ("--threshold", "3", "--min-region-size", "1000"), TOO_SMALL.format(1000)),
            (0, ("--threshold", "97%"), "all voxels are zero, NaN or infinite."),
            (0, ("--threshold", "3"), "all voxels are zero, NaN or infinite."),
        ],
    )
    def test_nothing_found(self, scale, options, explanation):
        said = succeed("extract", write_map("m.nii", DATA * scale), *options, "-o", "out")
        heading, explained = said.splitlines()
        assert heading.startswith("out/m_desc-regions_dseg.nii.gz: 0 regions of at least 1")
        assert explained == f"  Nothing found; {explanation}"
        assert not read_labels("out/m_desc-regions_dseg.nii.gz").any()
        assert len(pd.read_csv("out/m_desc-regions_dseg.tsv", sep="\t")) == 0

    @pytest.mark.parametrize("n_maps", [8, 9])
    def test_many_maps_are_one_line_each(self, n_maps):
        names = [write_map(f"m{number}.nii") for number in range(n_maps)]
        lines = succeed("extract", *names, *BOTH, "-o", "out").splitlines()
        headings = [f"out/m{number}_desc-regions_dseg.nii.gz:" for number in range(n_maps)]
        assert [line.split()[0] for line in lines if line.startswith("out/")] == headings
        assert ("┃" in "".join(lines)) == (n_maps == 8)

    def test_many_volumes_are_one_line_each(self):
        series = np.repeat(DATA[..., np.newaxis], 9, axis=-1)
        lines = succeed("extract", write_map("s.nii"), *BOTH, "-o", "out").splitlines()
        assert "┃" in "".join(lines)
        lines = succeed("extract", write_map("s.nii", series), *BOTH, "-o", "out").splitlines()
        assert len(lines) == 9

    def test_a_long_table_ends_with_where_the_rest_is(self):
        data = np.zeros((7, 14, 14), np.float32)
        data[::2, ::2, ::2] = 4.0
        data[4:, 8:] = 0
        n_regions = np.count_nonzero(data)
        said = succeed("extract", write_map("sub-01.run-1[a].nii", data), *BOTH, "-o", "out")
        assert sum(line.startswith("│") for line in said.splitlines()) == 40
        last = said.splitlines()[-1]
        table = "sub-01.run-1[a]_desc-regions_dseg.tsv"
        assert last == f"  … and {n_regions - 40} more in {table}"
        assert len(pd.read_csv(f"out/{table}", sep="\t")) == n_regions

    def test_voxels_that_are_not_finite_are_warned_of_once(self):
        data = DATA.copy()
        data[0, 0, :2] = np.nan, np.inf
        write_map("m[1].nii", data)
        result = run("extract", "m[1].nii", *BOTH, "-o", "out")
        assert result.exit_code == 0
        assert complaints(result) == (
            ["warning: m[1].nii: 2 voxels are NaN or infinite, and become background."],
            "1 map: 1 done, 2 regions",
        )
        np.testing.assert_array_equal(
            read_labels("out/m[1]_desc-regions_dseg.nii.gz"), (DATA > 0) + 2 * (DATA < 0)
        )

    @pytest.mark.filterwarnings("ignore::ResourceWarning")  # as Python does by default
    def test_warnings_for_developers_are_not_shown(self):
        nib.MGHImage(DATA, AFFINE).to_filename("m.mgh")  # which nibabel does not close again
        succeed("extract", "m.mgh", *BOTH, "-o", "out")
        assert written() == outputs("m")

    def test_brackets_and_colons_are_no_markup(self):
        Path("[cuda13]").mkdir()
        name = write_map("[cuda13]/[bold]m:brain:[bold].nii")
        Path("[red]bad.nii").touch()
        result = run("extract", name, "[red]bad.nii", *BOTH, "-o", "[out]")
        assert "[out]/[bold]m:brain:[bold]_desc-regions_dseg.nii.gz: 2 regions" in result.stdout
        assert complaints(result) == (
            ["failed: [red]bad.nii: expected an image, found an empty file."],
            "2 maps: 1 done, 1 failed ([out]/failures.tsv), 2 regions",
        )

    def test_lines_are_not_broken_however_narrow_the_terminal(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "20")
        result = run("extract", write_map("m.nii"), "missing.nii", "--threshold", "97", "-o", "out")
        assert len(result.stdout.splitlines()) == 2
        assert len(result.stderr.splitlines()) == 2

    def test_no_digit_is_cut_off_however_narrow_the_terminal(self, monkeypatch):
        wide = succeed("extract", write_map("m.nii"), *BOTH, "-o", "out")
        monkeypatch.setenv("COLUMNS", "30")
        narrow = run("extract", "m.nii", *BOTH, "-o", "out").stdout
        assert narrow == wide

    def test_a_bar_for_several_maps_on_a_terminal(self, monkeypatch):
        monkeypatch.setenv("FORCE_COLOR", "1")
        names = [write_map(f"m{number}.nii") for number in range(3)]
        several = run("extract", *names, *BOTH, "-o", "out")
        alone = run("extract", names[0], *BOTH, "-o", "out")
        assert "━ 0 of 3 maps" in plain(several.stderr)
        assert re.search(r"━ 3 of 3 maps; summing up\s*3 maps: 3 done", plain(several.stderr))
        assert "looking for maps" in alone.stderr
        assert "━" not in alone.stderr


class TestProgress:
    """What is said while maps are worked on, by a clock that stands still unless it is set."""

    @pytest.fixture
    def clock(self, monkeypatch):
        clock = SimpleNamespace(now=1000.0)
        clock.monotonic = lambda: clock.now
        monkeypatch.setattr(_watch, "time", clock)
        return clock

    @staticmethod
    def ended(number=0, status="done", **rest):
        source = str(Path.cwd() / f"m{number}.nii")
        return Record(source, 1, 1, "digest", f"m{number}", status, **rest)

    def test_a_line_now_and_then(self, clock, capsys):
        watching = _watch.Watch(_screen.console(stderr=True))
        with watching:
            watching(Progress(40_000, 0))
            for n_done, n_failed, now in [
                (1, 0, 1009.9),
                (1197, 3, 1000 + 1200 / 210),
                (1197, 3, 1010.0),
                (1300, 3, 1019.9),
                (1301, 3, 1020.1),
                (39_990, 3, 1400.0),
            ]:
                clock.now = now
                watching(Progress(40_000, 0, n_done, n_failed, self.ended()))
        assert capsys.readouterr().err.splitlines() == [
            "1,200 of 40,000 maps, 3 failed, 120 maps/s, 5 min left",
            "1,304 of 40,000 maps, 3 failed, 65 maps/s, 10 min left",
            "39,993 of 40,000 maps, 3 failed, 100 maps/s, 1 s left",
        ]

    def test_none_of_few_quick_maps(self, clock, capsys):
        watching = _watch.Watch(_screen.console(stderr=True))
        with watching:
            watching(Progress(2, 0))
            clock.now += 9
            watching(Progress(2, 0, 1, 0, self.ended()))
            watching(Progress(2, 0, 2, 0, self.ended()))
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize(
        ("n_done", "seconds", "said"),
        [
            (1, 120, "0.5 maps/min, 3 h 18 min left"),
            (50, 20, "2.5 maps/s, 20 s left"),
            (99, 0.001, "99,000 maps/s, 1 s left"),
        ],
    )
    def test_speeds_and_times(self, clock, capsys, monkeypatch, n_done, seconds, said):
        monkeypatch.setattr(_watch, "_SECONDS_BETWEEN_LINES", 0)
        watching = _watch.Watch(_screen.console(stderr=True))
        watching(Progress(100, 0))
        clock.now += seconds
        watching(Progress(100, 0, n_done, 0, self.ended()))
        assert capsys.readouterr().err == f"{n_done} of 100 maps, {said}\n"

    @pytest.mark.parametrize(
        ("n_to_do", "n_skipped", "n_failed", "said"),
        [
            (0, 1, 0, ["The map is done already."]),
            (0, 3, 0, ["All 3 maps are done already."]),
            (2, 1, 0, ["1 of 3 maps is done already."]),
            (3000, 37_000, 0, ["37,000 of 40,000 maps are done already."]),
            (
                0,
                2,
                1,
                [
                    "2 of 3 maps are done already.",
                    "1 map failed before and did not change since; --retry-failed tries it again.",
                ],
            ),
            (
                4,
                0,
                2,
                ["2 maps failed before and did not change since; --retry-failed tries them again."],
            ),
        ],
    )
    def test_what_need_not_be_done_is_said_once(self, capsys, n_to_do, n_skipped, n_failed, said):
        _watch.Watch(_screen.console(stderr=True))(Progress(n_to_do, n_skipped, 0, n_failed))
        assert capsys.readouterr().err.splitlines() == said

    def test_of_many_failures_and_warnings_the_first_are_shown(self, capsys):
        watching = _watch.Watch(_screen.console(stderr=True))
        watching(Progress(30, 0))
        for number in range(30):
            record = self.ended(
                number, "failed", error="OSError", message="gone.", warnings=("odd.",)
            )
            watching(Progress(30, 0, 0, number + 1, record))
        lines = capsys.readouterr().err.splitlines()
        failures = [line for line in lines if line.startswith("failed")]
        assert failures == [f"failed: m{number}.nii: gone." for number in range(20)] + [
            "failed: one more; from here on they are only counted."
        ]
        assert sum(line.startswith("warning") for line in lines) == 21
        assert watching.n_warnings == 30

    def test_maps_elsewhere_have_their_whole_path(self, capsys):
        for source in ("/data/m.nii", str(Path.cwd() / "sub" / "m.nii")):
            record = Record(source, 1, 1, "digest", "m", "failed", error="OSError", message="gone.")
            _watch.Watch(_screen.console(stderr=True)).tell(record)
        assert capsys.readouterr().err == "failed: /data/m.nii: gone.\nfailed: sub/m.nii: gone.\n"

    @pytest.mark.parametrize(
        ("n_done", "n_skipped", "n_failed", "summary", "n_warnings", "seconds", "said"),
        [
            (1, 0, 0, (), 0, 0.2, "1 map: 1 done, 1 region, 1 s"),
            (
                *(2996, 37_000, 4, ("failures", "regions"), 20, 720),
                "40,000 maps: 39,996 done (37,000 of them before), 4 failed (out/failures.tsv), "
                "39,996 regions (out/regions.tsv), 12 min",
            ),
            (
                *(0, 2, 1, (), 21, 3700),
                "3 maps: 2 done (all of them before), 1 failed, 2 regions, 21 warnings "
                "(out/.gpuroi), 1 h 2 min",
            ),
            (0, 0, 0, (), 0, 1, "There is no map for this shard."),
            (
                *(1, 0, 0, None, 0, 1),
                "1 map: 1 done, 1 region, 1 s; the summaries wait until the other shards of these "
                "maps have ended",
            ),
        ],
    )
    def test_the_sentence_at_the_end(
        self, n_done, n_skipped, n_failed, summary, n_warnings, seconds, said
    ):
        done = [self.ended(n, n_regions=1) for n in range(n_done + n_skipped)]
        failures = [self.ended(n, "failed") for n in range(n_failed)]
        cohort = CohortReport(
            folder=Path("out"),
            parameters={},
            maps=tuple(done + failures),  # of which nothing but the number counts
            records=tuple(done + failures),
            n_done=n_done,
            n_skipped=n_skipped,
            failures=tuple(failures),
            summary={}
            if summary is None
            else {name: Path.cwd() / "out" / f"{name}.tsv" for name in ("description", *summary)},
        )
        assert _watch.outcome(cohort, seconds, n_warnings) == said

    def test_lines_of_a_real_run(self, monkeypatch):
        monkeypatch.setattr(_watch, "_SECONDS_BETWEEN_LINES", 0)
        names = [write_map(f"m{number}.nii") for number in range(3)]
        lines, last = complaints(run("extract", *names, *BOTH, "-o", "out"))
        assert [line.split(",")[0] for line in lines] == [
            "1 of 3 maps",
            "2 of 3 maps",
            "3 of 3 maps; summing up",
        ]
        assert last == "3 maps: 3 done, 6 regions (out/regions.tsv)"


class TestWhichMaps:
    @pytest.fixture
    def tree(self):
        """Write four maps into a folder with folders."""
        for name in ("a.nii", "sub/b.nii.gz", "sub/c.nii", "sub/deep/a.nii"):
            Path("maps", name).parent.mkdir(parents=True, exist_ok=True)
            write_map(f"maps/{name}")
        return ["a", "sub/b", "sub/c", "sub/deep/a"]

    @staticmethod
    def extracted(*arguments):
        """Return the maps that a run takes, in its order."""
        said = succeed("extract", *arguments, *BOTH, "-o", "out")
        return re.findall(r"^out/(.*)_desc-regions_dseg\.nii\.gz: 2 regions", said, re.MULTILINE)

    def test_folders_keep_their_folders(self, tree):
        assert self.extracted("maps") == tree
        assert written("out/sub/deep") == files_of("a")

    def test_patterns_and_lists(self, tree):
        assert self.extracted("maps/sub/*.nii*") == ["b", "c"]
        shutil.rmtree("out")
        Path("some.txt").write_text("# a comment\nmaps/sub/c.nii\n\nmaps/a.nii\n")
        assert self.extracted("@some.txt") == ["c", "a"]

    def test_an_empty_folder_is_an_error(self):
        Path("none").mkdir()
        result = run("extract", "none")
        assert result.exit_code == 2
        assert result.stderr.startswith("error: none: there is no map here; name NIfTI files, ")

    @pytest.fixture
    def dataset(self):
        """Write a BIDS derivative of two participants, two tasks, two contrasts and two stats."""
        folder = Path("glm")
        folder.mkdir()
        (folder / "dataset_description.json").write_text("{}")
        for subject, task, contrast, stat in product(
            ("01", "02"), ("motor", "rest"), ("left", "right"), ("t", "z")
        ):
            (folder / f"sub-{subject}").mkdir(exist_ok=True)
            write_map(
                f"glm/sub-{subject}/sub-{subject}_task-{task}_contrast-{contrast}_stat-{stat}"
                "_statmap.nii"
            )
        write_map("glm/sub-01/sub-01_task-rest_bold.nii")
        return "glm"

    @pytest.mark.parametrize(
        ("options", "n_maps", "matches"),
        [
            ((), 16, "sub-"),
            (("--participant-label", "01"), 8, "sub-01_"),
            (("--participant_label", "sub-02"), 8, "sub-02_"),
            (("--participant-label", "01", "--participant_label", "02"), 16, "sub-"),
            (
                ("--participant_label", "01", "sub-02", "--task=motor", "rest", "--stat", "t"),
                8,
                "sub-",
            ),
            (("--task", "rest"), 8, "_task-rest_"),
            (("--contrast", "left", "--stat", "t"), 4, "_contrast-left_stat-t_"),
            (("--stat", "z", "--stat", "t", "--task", "motor"), 8, "_task-motor_"),
        ],
    )
    def test_bids_datasets_by_their_names(self, dataset, options, n_maps, matches):
        maps = self.extracted(dataset, *options)
        assert len(maps) == n_maps
        assert [name for name in maps if matches not in name] == []

    def test_labels_where_folders_are_called_like_them(self, dataset, monkeypatch):
        monkeypatch.chdir(dataset)
        maps = self.extracted(".", "--participant-label", "sub-01", "sub-02", "--contrast", "left")
        assert len(maps) == 8
        Path("rest").mkdir()
        result = run("extract", ".", "--task", "motor", "rest")
        assert result.exit_code == 2
        said = " ".join(plain(result.stderr).replace("│", " ").split())
        assert (
            "rest behind --task may be a label or an input: write task-rest for the label" in said
        )

    def test_labels_that_no_map_has_are_told(self, dataset):
        result = run("extract", dataset, "--participant-label", "01", "9", "--task", "rest")
        assert "warning: of all maps that are asked for, none has sub-9 in its name.\n" in (
            result.stderr
        )
        assert result.exit_code == 0

    def test_shards_share_the_maps(self, tree):
        whole = self.extracted("maps")
        alone = contents()
        shutil.rmtree("out")
        parts = []
        for number in (1, 2, 3):
            parts.append(self.extracted("maps", "--shard", f"{number}/3"))
            assert Path("out/regions.tsv").exists() == (number == 3)
        assert parts == [whole[0::3], whole[1::3], whole[2::3]]
        assert contents() == alone
        result = run("extract", "maps", *BOTH, "-o", "out", report=True)
        assert complaints(result) == (
            ["All 4 maps are done already."],
            "4 maps: 4 done (all of them before), 8 regions (out/regions.tsv)",
        )
        assert result.stdout.endswith("The report is out/report.html\n")

    def test_a_shard_has_no_report_and_may_be_empty(self):
        write_map("m.nii")
        result = run("extract", "m.nii", "--shard", "1/2", *BOTH, "-o", "out", report=True)
        assert (result.exit_code, "report" in result.stdout) == (0, False)
        result = run("extract", "m.nii", "--shard", "2/2", *BOTH, "-o", "out", report=True)
        assert (result.exit_code, result.stdout) == (0, "")
        assert result.stderr == "There is no map for this shard.\n"

    def test_every_option_has_both_spellings(self):
        write_map("m.nii")
        said = succeed("extract", "m.nii", "--min_region_size=0", "--threshold", 5.5, "-o", "out_x")
        assert said.startswith("out_x/m_desc-regions_dseg.nii.gz: 1 region of at least 0 mm³")

    def test_a_limit(self, tree):
        assert self.extracted("maps", "--limit", 3) == tree[:3]


class TestOptionsOfTheRun:
    @pytest.fixture
    def asked(self, monkeypatch):
        """Return what `extract_cohort` has been asked for."""
        asked = {}

        def extract(*arguments, **options):
            asked.update(options)
            return extract_cohort(*arguments, **options)

        monkeypatch.setattr("gpuroi.cohort.extract_cohort", extract)
        return asked

    def test_defaults(self, asked):
        succeed("extract", write_map("m.nii"), *BOTH, "-o", "out")
        del asked["on_progress"]
        assert asked == {
            "entities": {"sub": [], "task": [], "contrast": [], "stat": []},
            "shard": None,
            "limit": None,
            "jobs": None,
            "batch_size": None,
            "retry_failed": False,
            "backend": "auto",
            "on_gpu_error": "stop",
            "client": None,
        }

    @pytest.mark.parametrize(
        ("options", "name", "value"),
        [
            (("--jobs", 2), "jobs", 2),
            (("--batch-size", 16), "batch_size", 16),
            (("--batch-size", "auto"), "batch_size", None),
            (("--on-gpu-error", "cpu"), "on_gpu_error", "cpu"),
            (("--retry-failed",), "retry_failed", True),
            (("--shard", "1/1"), "shard", (1, 1)),
            (("--backend", "cpu"), "backend", "cpu"),
        ],
    )
    def test_each_reaches_the_cohort(self, asked, options, name, value):
        succeed("extract", write_map("m.nii"), *BOTH, "-o", "out", *options)
        assert asked[name] == value

    def test_processes_write_the_same(self):
        names = [write_map(f"m{number}.nii", DATA * (number + 1)) for number in range(5)]
        succeed("extract", *names, *BOTH, "-o", "one", "--jobs", 1)
        succeed("extract", *names, *BOTH, "-o", "two", "--jobs", 2, "--batch-size", 2)
        assert contents("one") == contents("two")


class TestAgain:
    def test_what_is_done_is_said_and_shown_again(self):
        series = write_map("s.nii", np.stack([DATA, -DATA], axis=-1))
        command = ("extract", write_map("a.nii"), series, *BOTH, "-o", "out", "--report")
        first = run(*command, report=True)
        before = contents()
        again = run(*command, report=True)
        assert again.stdout == first.stdout
        assert first.stdout.count("┏") == 3
        assert complaints(again) == (
            ["All 2 maps are done already."],
            "2 maps: 2 done (all of them before), 6 regions (out/regions.tsv)",
        )
        after = contents()
        assert before.keys() == after.keys()
        for name in before.keys() - {"report.html"}:  # which has its date
            assert after[name] == before[name]

    def test_other_parameters_do_all_again(self):
        write_map("m.nii")
        succeed("extract", "m.nii", *BOTH, "-o", "out")
        said = succeed("extract", "m.nii", "--threshold", 5.5, "--min-region-size", 0, "-o", "out")
        assert "1 region of at least 0 mm³ at |value| ≥ 5.5" in said

    def test_failures_stay_until_they_are_to_be_tried_again(self):
        Path("bad.nii").touch()
        command = ("extract", "bad.nii", write_map("m.nii"), *BOTH, "-o", "out")
        failed = "failed: bad.nii: expected an image, found an empty file."
        first = run(*command)
        assert first.exit_code == 1
        assert complaints(first)[0] == [failed]
        second = run(*command)
        assert second.exit_code == 1
        assert complaints(second) == (
            [
                "1 of 2 maps is done already.",
                "1 map failed before and did not change since; --retry-failed tries it again.",
                failed,
            ],
            "2 maps: 1 done (all of them before), 1 failed (out/failures.tsv), 2 regions",
        )
        third = run(*command, "--retry-failed")
        assert third.exit_code == 1
        assert complaints(third)[0] == ["1 of 2 maps is done already.", failed]
        assert len(Path("out/.gpuroi/ledger.jsonl").read_text().splitlines()) == 3

    def test_a_map_that_is_gone_cannot_be_shown(self, monkeypatch):
        def unreadable(prefix, volume):
            raise OSError("stale file handle")

        monkeypatch.setattr("gpuroi.cohort._results.read_back", unreadable)
        result = run("extract", write_map("m.nii"), *BOTH, "-o", "out")
        assert result.exit_code == 1
        assert complaints(result)[0] == [
            "error: the tables cannot be shown (stale file handle); the results are complete."
        ]
        assert written() == outputs("m")

    def test_interrupted_it_goes_on_where_it_was(self):
        Path("maps").mkdir()
        for number in range(400):
            write_map(f"maps/m{number:03d}.nii")
        command = ("extract", "maps", *BOTH, "-o", "out", "--jobs", "2")
        running = subprocess.Popen(
            [*IN_A_PROCESS, *command],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        ledger = Path("out/.gpuroi/ledger.jsonl")
        while running.poll() is None and not (ledger.exists() and ledger.stat().st_size):
            time.sleep(0.005)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does
        _, said = running.communicate()
        assert (running.returncode, said) == (130, "interrupted; run again to go on\n")
        assert list(Path("out").rglob("*.tmp")) == []
        n_done = len(ledger.read_text().splitlines())
        assert 0 < n_done < 400
        lines, last = complaints(run(*command))
        assert re.fullmatch(r"\d+ of 400 maps (is|are) done already\.", lines[0])
        assert last.startswith("400 maps: 400 done (")
        succeed("extract", "maps", *BOTH, "-o", "calm")
        assert contents("out") == contents("calm")


class TestDask:
    @pytest.fixture
    def cluster(self):
        distributed = pytest.importorskip("distributed")
        options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
        with distributed.LocalCluster(**options, silence_logs=50) as cluster:
            yield cluster

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")  # of distributed and tornado, about sockets that close
    def test_a_scheduler_by_its_address_or_its_file(self, cluster):
        names = [write_map(f"m{number}.nii") for number in range(3)]
        address = cluster.scheduler_address
        Path("scheduler.json").write_text(json.dumps({"address": address}))
        for folder, where in (("one", address), ("other", "scheduler.json")):
            succeed("extract", *names, *BOTH, "-o", folder, "--dask", where)
        assert contents("one") == contents("other")
        assert written("one") == outputs("m0", "m1", "m2")

    def test_without_distributed_it_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "distributed", None)
        result = run("extract", write_map("m.nii"), "-o", "out", "--dask", "localhost:8786")
        assert result.exit_code == 2
        assert result.stderr.startswith("error: --dask needs distributed, which cannot be imported")
        assert result.stderr.endswith("pip install 'gpuroi[dask]'.\n")
        assert written(".") == ["m.nii"]


def test_local_regions_takes_its_own_parameters():
    rng = np.random.default_rng(0)
    path = write_map("noise.nii", rng.standard_normal((12, 13, 14)).astype(np.float32))
    counts = []
    for distance in (1, 12):
        result = run(
            *("extract", path, "--method", "local_regions", "--threshold", "60%"),
            *("--min-region-size", 0, "--smoothing-fwhm", 0, "--seed-distance", distance),
        )
        assert result.exit_code == 0
        sidecar = json.loads(Path("regions-out/noise_desc-regions_dseg.json").read_text())
        assert sidecar["parameters"]["seed_distance"] == distance
        assert sidecar["random_walker"]["n_undecided"] == 0
        counts.append(sidecar["regions"])
    assert counts[0] > counts[1]


def test_a_volume_never_takes_the_place_of_another_map():
    series = write_map("v.nii", np.stack([DATA, DATA], axis=-1))
    result = run("extract", series, write_map("v_vol-0000.nii"), "-o", "out")
    assert result.exit_code == 2
    assert "a volume of v.nii could be written as v_vol-0000_desc" in result.stderr


def test_an_outcome_of_the_size_filter_is_named():
    result = run("extract", write_map("a.nii"), "--threshold", 3, "--min-region-size", 5000)
    assert "voxels at the cut-off fill no region of 5000 mm³ (--min-region-size)" in result.stdout


class TestFailures:
    @pytest.fixture
    def lost_device(self, monkeypatch):
        """Let the first device that regions are looked for on fail; another is the CPU."""
        devices = []

        class Lost(Finder):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                if not devices:
                    self.computed_by = SimpleNamespace(name="cuda")
                    self.batch_bytes = 2**20
                devices.append(self)

            def __call__(self, batch):
                if self is devices[0]:
                    raise RuntimeError("cudaErrorIllegalAddress: an illegal memory access.")
                return super().__call__(batch)

        monkeypatch.setattr("gpuroi.cohort._tasks.Finder", Lost)

    @pytest.mark.usefixtures("lost_device")
    def test_a_lost_device_stops_the_run(self):
        result = run("extract", write_map("a.nii"), *BOTH, "-o", "out", report=True)
        assert result.exit_code == 1
        assert result.stderr == (
            "error: the device failed: cudaErrorIllegalAddress: an illegal memory access. What is "
            "done is kept; run again to go on, or say that the CPU is to take its place "
            "(--on-gpu-error cpu).\n"
        )
        assert result.stdout == ""
        assert written() == [".gpuroi"]

    @pytest.mark.usefixtures("lost_device")
    def test_the_cpu_takes_its_place_when_asked(self):
        result = run("extract", write_map("a.nii"), *BOTH, "--on-gpu-error", "cpu", "-o", "out")
        assert result.exit_code == 0
        assert "2 regions of at least 0 mm³ at |value| ≥ 3 (threshold 3, cpu)" in result.stdout

    def test_a_bad_map_does_not_stop_the_others(self):
        names = [write_map("a.nii"), "bad.nii.gz", "missing.nii", write_map("z.nii.gz")]
        Path("bad.nii.gz").write_bytes(Path("z.nii.gz").read_bytes()[:-20])
        result = run("extract", *names, *BOTH, "-o", "out")
        assert result.exit_code == 1
        assert written() == outputs("a", "z", others=["failures.tsv"])
        lines, last = complaints(result)
        bad, missing = sorted(lines)
        assert bad.startswith("failed: bad.nii.gz: expected a whole gzip stream, ")
        assert missing == "failed: missing.nii: no such file."
        assert last == "4 maps: 2 done, 2 failed (out/failures.tsv), 4 regions (out/regions.tsv)"
        assert result.stdout.count("2 regions of at least") == 2

    def test_an_error_that_nobody_foresaw_is_one_maps(self, monkeypatch):
        def read(source):
            raise KeyError("scl_slope")

        monkeypatch.setattr("gpuroi.io.read_maps", read)
        result = run("extract", write_map("b.nii"), *BOTH, "-o", "out")
        assert result.exit_code == 1
        assert complaints(result)[0] == ["failed: b.nii: KeyError: 'scl_slope'"]

    def test_one_without_a_message_is_named(self, monkeypatch):
        def read(source):
            raise AssertionError

        monkeypatch.setattr("gpuroi.io.read_maps", read)
        result = run("extract", write_map("b.nii"), *BOTH, "-o", "out")
        assert complaints(result)[0] == ["failed: b.nii: AssertionError"]

    def test_all_bad(self):
        Path("bad.nii").write_bytes(b"no map")
        result = run("extract", "bad.nii", "-o", "out")
        assert result.exit_code == 1
        (said,), ended = complaints(result)
        assert said.startswith("failed: bad.nii: expected a NIfTI header")
        assert ended == "1 map: 0 done, 1 failed (out/failures.tsv), 0 regions"
        assert result.stdout == ""
        assert written() == outputs(others=["failures.tsv"])

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["typo.nii"], r"error: typo\.nii: there is no such file\.\n"),
            (
                ["a.nii", "b.nii"],
                r"error: none of 2 maps is there, neither a\.nii nor ",
            ),
        ],
    )
    def test_none_that_is_there(self, names, message):
        result = run("extract", *names, "-o", "out")
        assert result.exit_code == 2
        assert re.match(message, result.stderr)
        assert not Path("out").exists()

    def test_a_reason_without_the_map_is_given_its_name(self, monkeypatch):
        def broken(*arguments, **options):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        Path("in").mkdir()
        monkeypatch.setattr("gpuroi.cohort._outputs.io.write_bytes", broken)
        monkeypatch.setattr("gpuroi.cohort._summary.io.write_text", lambda *_: None)
        result = run("extract", write_map("in/m.nii"), *BOTH, "-o", "out")
        assert result.exit_code == 1
        assert complaints(result)[0] == ["failed: in/m.nii: [Errno 5] Input/output error"]

    @pytest.mark.parametrize(
        "name",
        [
            "gpuroi.cohort._outputs.io.write_bytes",
            "gpuroi.cohort._summary.io.write_text",
            "gpuroi.cohort._run.Ledger",  # before the first map
        ],
    )
    def test_a_full_disk_stops_the_run(self, monkeypatch, name):
        def full(*arguments, **options):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(name, full)
        result = run("extract", write_map("m.nii"), *BOTH, "-o", "out", report=True)
        has_begun = not name.endswith("Ledger")
        assert result.exit_code == (1 if has_begun else 2)
        assert re.fullmatch(
            r"error: .*/out cannot be written to: No space left on device\."
            + r" What is done is kept; run again to go on\." * has_begun
            + r"\n",
            result.stderr,
        )
        assert result.stdout == ""

    def test_a_folder_that_another_run_writes_to(self):
        with Ledger(Path("out"), None):
            result = run("extract", write_map("m.nii"), "-o", "out")
        assert result.exit_code == 2
        assert re.fullmatch(
            r"error: .*/out is in use by another run; wait for it, or write to another .*\n",
            result.stderr,
        )

    def test_our_own_mistakes_have_a_traceback(self, monkeypatch):
        def wrong(*arguments):
            raise TypeError("unsupported operand")

        monkeypatch.setattr("gpuroi.cohort._run.write_summary", wrong)
        with pytest.raises(TypeError, match="unsupported operand"):
            run("extract", write_map("m.nii"), "-o", "out")

    def test_a_folder_in_the_way_of_a_label_image(self):
        Path("out/a_desc-regions_dseg.nii.gz").mkdir(parents=True)
        result = run("extract", write_map("a.nii"), write_map("b.nii"), *BOTH, "-o", "out")
        assert result.exit_code == 1
        assert re.match(r"failed: a\.nii: .*a_desc-regions_dseg\.nii\.gz", result.stderr)
        assert written() == outputs("b", others=["a_desc-regions_dseg.nii.gz", "failures.tsv"])

    def test_an_unreadable_map_is_one_bad_map(self):
        Path(write_map("a.nii")).chmod(0)
        if os.access("a.nii", os.R_OK):
            pytest.skip("this user may read everything")
        result = run("extract", "a.nii", write_map("b.nii"), *BOTH, "-o", "out")
        assert result.exit_code == 1
        assert "failed: [Errno 13] Permission denied: 'a.nii'" in result.stderr
        assert written() == outputs("b", others=["failures.tsv"])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], r"there is no map to work on; name a file, or pass --sample\."),
            (["m.nii", "--threshold", "x%"], r"--threshold x% is no number followed by .*'97%'"),
            (["m.nii", "--threshold", "True"], "--threshold True is no number followed by .*'97%'"),
            (["m.nii", "--threshold", "9_7"], "--threshold 9_7 is no number followed by"),
            (["m.nii", "--threshold", "101%"], "--threshold 101% is outside 0% to 100%; pass"),
            (["m.nii", "--threshold", "-3%"], "--threshold -3% is outside 0% to 100%; pass"),
            (["m.nii", "--threshold", "nan"], "--threshold nan is not a number that voxels can"),
            (
                ["m.nii", "--threshold", "-3"],
                "--threshold -3.0 is below zero; .*--threshold 3 w",
            ),
            (["m.nii", "--tail", "up"], "--tail up is not one of 'both', 'positive', 'negative'"),
            (["m.nii", "--connectivity", "7"], r"--connectivity 7 is not one of 6, 18, 26\."),
            (["m.nii", "--connectivity", "six"], "Invalid value for '--connectivity'"),
            (["m.nii", "--method", "walk"], "--method walk is not one of 'connected_components'"),
            (
                ["m.nii", "--method", "local_regions", "--connectivity", "26"],
                "--connectivity 26 has no meaning for --method local_regions",
            ),
            (["m.nii", "--backend", "tpu"], "--backend tpu is unknown; gpuroi has cpu, cuda and"),
            (["m.nii", "--min-region-size", "-1"], "--min-region-size -1.0 is not a finite number"),
            (["m.nii", "--min-region-size", "nan"], "--min-region-size nan is not a finite number"),
            (["m.nii", "--population", "brain"], "--population brain is neither 'all' nor"),
            (["m.nii", "--mask", "no.nii"], "'--mask': .*'no.nii' does not exist"),
            (["m.nii", "--mask", "."], "'--mask': .*'.' is a directory"),
            (["m.nii", "-o", "m.nii"], "'--output' / '-o': .*'m.nii' is a file"),
            (["m.nii", "-o", "m.nii/out"], r"Not a directory: '.*/m\.nii/out"),
            (["m.nii", "m.nii.gz"], "m.nii and m.nii.gz would both write m_desc-regions_dseg"),
            (["m.nii", "m.nii.gz"], "leave one of them out, or extract them into separate folders"),
            (["x*.nii"], r"x\*\.nii: there is no map here"),
            (["@no.txt"], r"the list no\.txt cannot be read: No such file or directory"),
            (["m.nii", "--task", "rest"], r"no map has task-rest in its name"),
            (["m.nii", "--shard", "3"], "--shard '3' is not i/n; pass, say, 3/16 for the third"),
            (["m.nii", "--shard", "1/2/3"], "--shard '1/2/3' is not i/n"),
            (["m.nii", "--shard", "-1/2"], "--shard '-1/2' is not i/n"),
            (["m.nii", "--shard", "0/2"], r"shard 0/2 does not exist; pass 1/2 and on\."),
            (["m.nii", "--shard", "3/2"], r"shard 3/2 does not exist"),
            (["m.nii", "--shard", "1/2", "--report"], "--report and --shard do not go together"),
            (
                ["m.nii", "--limit", "0"],
                "--limit 0 leaves nothing to do; pass a number of maps",
            ),
            (["m.nii", "--jobs", "0"], "--jobs 0 is not a number of processes >= 1"),
            (["m.nii", "--jobs", "2", "--dask", "x:1"], "--jobs and --dask do not go together"),
            (["m.nii", "--batch-size", "0"], "--batch-size '0' is neither auto nor a number of"),
            (["m.nii", "--batch-size", "many"], "--batch-size 'many' is neither auto nor"),
            (["m.nii", "--on-gpu-error", "go"], "--on-gpu-error go is not one of 'stop', 'cpu'"),
            (["m.nii", "--dask", "s.json"], r"--dask 's\.json' is neither the address of a sched"),
            (["m.img", "M.hdr", "m.HDR"], "m.img and m.HDR would both write m_desc-regions_dseg"),
            (["m.nii", "--nonsense"], "No such option: --nonsense"),
        ],
    )
    def test_what_cannot_be_meant_is_refused_before_anything_is_done(self, arguments, message):
        write_map("m.nii")
        out = ["-o", "out"] if "-o" not in arguments else []
        result = run("extract", *out, *arguments, report=True)
        assert result.exit_code == 2
        assert re.search(message, plain(result.stderr))
        assert result.stdout == ""
        assert written(".") == ["m.nii"]

    @pytest.mark.parametrize("folder", ["closed", "closed/out"])
    def test_a_folder_that_cannot_be_written_to(self, folder):
        Path("closed").mkdir(mode=0o555)
        if os.access("closed", os.W_OK):
            pytest.skip("this user may write everywhere")
        result = run("extract", write_map("m.nii"), "-o", folder)
        assert result.exit_code == 2
        assert re.search(
            "'closed' is not writable|Permission denied: '.*closed/out'", result.stderr
        )

    def test_a_backend_that_cannot_run_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cupy", None)
        backends._load.cache_clear()
        result = run("extract", write_map("m.nii"), "--backend", "cuda")
        backends._load.cache_clear()
        assert result.exit_code == 2
        assert re.match(
            r"error: CuPy cannot be imported .*; pip install 'gpuroi\[cuda13\]' ", result.stderr
        )

    def test_the_sample_without_nilearn_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "nilearn", None)
        result = run("extract", "--sample", "-o", "out")
        assert result.exit_code == 2
        assert "not installed; pip install 'gpuroi[sample]'." in result.stderr


class TestReport:
    def test_by_default_for_few_maps(self):
        names = [write_map("a.nii"), write_map("b.nii", DATA * 2)]
        said = succeed("extract", *names, *BOTH, "-o", "out", report=True)
        assert said.splitlines()[-1] == "The report is out/report.html"
        assert written() == outputs("a", "b", others=["report.html"])
        np.testing.assert_array_equal(read_labels("out/overlap.nii.gz"), 2 * (DATA != 0))
        page = Path("out/report.html").read_text()
        assert '<a href="overlap.nii.gz">' in page
        assert page.index(">a</a>") < page.index(">b</a>")

    def test_none_where_it_is_not_wanted(self):
        said = succeed("extract", write_map("a.nii"), *BOTH, "-o", "out")
        assert "report" not in said
        assert written() == outputs("a")

    @pytest.mark.parametrize("as_series", [False, True])
    def test_of_many_maps_only_when_asked_for(self, as_series):
        if as_series:
            names = [write_map("s.nii", np.repeat(DATA[..., np.newaxis], 51, axis=-1))]
        else:
            names = [write_map(f"m{number}.nii") for number in range(51)]
        said = succeed("extract", *names, *BOTH, "-o", "out", report=True)
        assert said == "More than 50 maps: --report writes a report, too.\n"
        assert len(written()) == 3 * 51 + 4
        result = run("extract", *names, *BOTH, "-o", "out", "--report", report=True)
        assert (result.exit_code, result.stdout) == (0, "The report is out/report.html\n")
        assert len(written()) == 3 * 51 + 6  # the page, and a folder
        assert len(written("out/report_data")) == 51

    def test_failures_are_in_it_and_the_exit_code_stays(self):
        result = run("extract", write_map("a.nii"), "<b>.nii", *BOTH, "-o", "out", report=True)
        assert result.exit_code == 1
        assert result.stdout.endswith("The report is out/report.html\n")
        assert '<td class="words">&lt;b&gt;.nii</td>' in Path("out/report.html").read_text()

    def test_of_nothing_but_failures(self):
        Path("bad.nii").write_bytes(b"no map")
        result = run("extract", "bad.nii", "-o", "out", report=True)
        assert result.exit_code == 1
        assert result.stdout == "The report is out/report.html\n"
        assert written() == outputs(others=["failures.tsv", "report.html"])
        assert "bad.nii: expected a NIfTI header" in Path("out/report.html").read_text()

    @pytest.mark.parametrize("step", ["add", "write"])
    def test_one_that_cannot_be_written_loses_no_results(self, step, monkeypatch):
        def full(*arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "report.html")

        monkeypatch.setattr(f"gpuroi.report.Report.{step}", full)
        names = [write_map("a.nii"), write_map("b.nii")]
        result = run("extract", *names, *BOTH, "-o", "out", report=True)
        assert result.exit_code == 1
        assert complaints(result) == (
            [
                "error: the report could not be written ([Errno 28] No space left on device: "
                "'report.html'); the results are complete."
            ],
            "2 maps: 2 done, 4 regions (out/regions.tsv)",
        )
        assert result.stdout.count("2 regions of at least") == 2
        assert written() == outputs("a", "b")

    def test_again_replaces_it(self):
        for threshold in (5, 3):
            succeed("extract", write_map("a.nii"), *BOTH, "--threshold", threshold, "-o", "out")
        assert not Path("out/report.html").exists()
        Path("out/report.html").write_text("old")
        succeed("extract", write_map("a.nii"), *BOTH, "-o", "out", report=True)
        assert Path("out/report.html").read_text().startswith("<!DOCTYPE html>")


class TestDevices:
    def test_says_what_can_run_and_what_auto_takes(self):
        said = succeed("devices")
        device = backends.get_backend("cpu").device
        assert re.search(rf"│ cpu +│ yes +│ {re.escape(device)} +│ numpy {np.__version__} ", said)
        assert re.search(r"│ cuda +│ (yes|no) +│ ", said)
        assert said.endswith("'auto' takes cpu.\n")

    def test_says_why_the_others_cannot(self, monkeypatch):
        reasons = {"cpu": None, "abacus": "pip install 'gpuroi[beads]' :brain:"}
        monkeypatch.setattr(backends, "available_backends", lambda: reasons)
        said = succeed("devices")
        assert re.search(r"│ abacus +│ no +│ pip install 'gpuroi\[beads\]' :brain: +│", said)

    def test_a_bad_environment_is_an_error_after_the_table(self, monkeypatch):
        monkeypatch.setenv("GPUROI_BACKEND", "abacus")
        result = run("devices")
        assert result.exit_code == 2
        assert "│ cpu " in result.stdout
        assert result.stderr.startswith("error: GPUROI_BACKEND='abacus' is unknown; gpuroi has")


class TestProgram:
    def test_version(self):
        assert succeed("--version") == f"gpuroi {gpuroi.__version__}\n"

    @pytest.mark.parametrize(
        ("command", "words"),
        [
            (["--help"], ["extract", "devices", "--version"]),
            (
                ["extract", "--help"],
                [
                    *("[INPUT]...", "--output", "--sample", "97%", "mm^3", "_vol-0000"),
                    *("Which maps", "How", "Where it runs", "--participant-label"),
                    *("--shard", "--dask", "one for each core", "OUT/failures.tsv"),
                ],
            ),
            (["devices", "--help"], ["which backends can run here"]),
        ],
    )
    def test_help(self, command, words):
        said = succeed(*command)
        assert [word for word in words if word not in said] == []

    def test_without_a_command_the_help_is_shown(self):
        result = run()
        assert result.exit_code == 2
        assert "extract" in result.output

    def test_the_script_is_this_program(self):
        (script,) = entry_points(group="console_scripts", name="gpuroi")
        assert script.load() is cli.main

    @pytest.mark.parametrize("words", [["--help"], ["extract", "--help"]])
    def test_help_loads_nothing_heavy(self, words):
        code = (
            "import sys\nfrom gpuroi.cli import main\n"
            "try:\n    main()\nfinally:\n    print(*sys.modules, file=sys.stderr)"
        )
        command = (sys.executable, "-c", code, *words)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        loaded = {name.partition(".")[0] for name in done.stderr.split()}
        assert "typer" in loaded
        heavy = {"numpy", "scipy", "pandas", "nibabel", "matplotlib", "nilearn", "cupy", "cucim"}
        assert not heavy & loaded

    def test_help_takes_less_than_three_tenths_of_a_second(self):
        def seconds():
            """Return a process's own time, which does not depend on what else runs here."""
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([*IN_A_PROCESS, "--help"], stdout=subprocess.DEVNULL, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

        assert min(seconds() for _ in range(3)) < 0.3

    @pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
    def test_a_real_process_on_a_terminal_of_any_encoding(self, encoding):
        command = ("extract", write_map("m.nii"), "bäd.nii", *BOTH, "-o", "out")
        done = subprocess.run(
            [*IN_A_PROCESS, *command],
            capture_output=True,
            encoding=encoding,
            env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONWARNINGS": "error"},
        )
        assert done.returncode == 1
        assert "out/m_desc-regions_dseg.nii.gz: 2 regions of at least 0 mm" in done.stdout
        assert ("|value| ≥ 3" in done.stdout) == (encoding == "utf-8")
        assert re.match(r"failed: b.+d\.nii: no such file\.\n2 maps: 1 done, 1 failed", done.stderr)
        assert written() == outputs("m", others=["failures.tsv", "report.html"])


@pytest.mark.parametrize(
    ("options", "explanation"),
    [
        (
            ("--tail", "negative"),
            "voxels of this sign at the cut-off if there are any fill no regi",
        ),
        (
            ("--mask", "mask.nii"),
            "voxels in the mask at the cut-off if there are any fill no regio",
        ),
        (
            ("--tail", "negative", "--min-region-size", "0"),
            "no voxel of this sign reaches the cut-",
        ),
        (
            ("--threshold", "99.9%", "--population", "nonzero"),
            "the strongest voxels tie with the pe",
        ),
    ],
)
def test_why_nothing_is_found_is_true(options, explanation):
    data = np.zeros((12, 12, 12), np.float32)
    data[2:5, 2:5, 2:5], data[8, 8, 8] = 8.0, -2.0
    write_map("mask.nii", (data < 0).astype(np.uint8))
    write_map("m.nii", data)
    asked = ("--threshold", "3", *options)
    assert f"Nothing found; {explanation}" in run("extract", "m.nii", *asked).stdout


def test_warnings_of_an_earlier_run_are_told_again_and_are_in_the_report():
    command = ("extract", write_map("m.nii"), "--threshold", "50%", "-o", "out")
    told = "m.nii: at least 50% of the voxels ranked are zero, so that all others are kept; --popu"
    for _ in range(2):
        assert f"warning: {told}" in run(*command, report=True).stderr
    assert "of the voxels ranked are zero, so that all others are kept" in (
        Path("out/report.html").read_text()
    )


def test_names_of_files_are_not_taken_for_options():
    for path in ("threshold=3/method='abc'/gone.nii", "threshold=3.0_tmap.nii.gz"):
        assert run("extract", path).stderr == f"error: {path}: there is no such file.\n"


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_pipe_that_nobody_reads_ends_nothing(closed):
    names = [write_map(f"m{number}.nii") for number in range(3)]
    program = [sys.executable, "-m", "gpuroi", "extract", *names, "--threshold", "50%"]
    command = [*program, "--min-region-size", "0", "--no-report"]  # warns, and prints tables
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        getattr(process, closed).close()
        other = process.stderr if closed == "stdout" else process.stdout
        said = other.read().decode()
    assert process.returncode == 0
    assert ("3 maps: 3 done" if closed == "stdout" else "m2_desc-regions_dseg.nii.gz: ") in said

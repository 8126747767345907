"""Each benchmark case runs, does the same work on both sides, and leaves a line behind."""

import json

import pytest

from benchmarks import report, run
from benchmarks.cases import CASES


@pytest.mark.parametrize("case", CASES)
def test_a_tiny_run_of_each_case(case):
    for comparison in CASES[case](tiny=True):
        record = run.measure(comparison, repeats=2)
        assert record["speed_up"][record["reference"]] == 1.0
        assert all(seconds > 0 for seconds in record["median_s"].values())


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

"""Each benchmark case runs, does the same work on both sides, and leaves a line behind."""

import json

import numpy as np
import pytest

from benchmarks import report, run
from benchmarks.cases import CASES


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


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_pages_show_the_recorded_figures(page):
    assert "<!-- benchmarks:" in page.read_text()
    assert report.render(page.read_text()) == page.read_text()

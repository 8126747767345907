"""Every example in a docstring or in Markdown runs and prints what it says."""

import doctest
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.testing.compare import compare_images

import gpuroi
from tests.test_plotting import TOLERANCE

ROOT = Path(__file__).parents[1]
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(gpuroi.__path__, "gpuroi.")
    if name != "gpuroi.testing"
]
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
OUTPUT = "# > "
REFUSED_CALL = re.compile(r"^\| `(.+?)` \| (\* )?`(.+?)` \|", re.MULTILINE)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, monkeypatch):
    monkeypatch.setenv("GPUROI_BACKEND", "cpu")
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


@pytest.mark.parametrize("page", ["README.md", *sorted(p.name for p in ROOT.glob("docs/*.md"))])
def test_python_blocks_of_pages_run_in_order(page, tmp_path, monkeypatch, capsys):
    if page == "guide.md":  # whose output names the backend
        monkeypatch.setenv("GPUROI_BACKEND", "cpu")
    monkeypatch.chdir(tmp_path)
    path = ROOT / page if page == "README.md" else ROOT / "docs" / page
    text = path.read_text()
    namespace = {}
    for block in PYTHON_BLOCK.findall(text):
        exec(compile(block, str(path), "exec"), namespace)
        said = [line[len(OUTPUT) :] for line in block.splitlines() if line.startswith(OUTPUT)]
        assert capsys.readouterr().out.splitlines() == said
    if page == "guide.md":
        assert_refused(text, namespace)
        assert_pictures(tmp_path, ROOT / "docs/images/guide")


def assert_pictures(drawn, shown):
    """Compare the pictures in two folders: those of a page are what its code draws."""
    for path in shown.glob("*.png"):
        assert compare_images(path, drawn / path.name, TOLERANCE) is None


def assert_refused(text, namespace):
    """Make the calls of the table of mistakes: each has the message that the table quotes."""
    refused = REFUSED_CALL.findall(text)
    assert len(refused) == 16
    for call, star, message in refused:
        with pytest.raises((Warning, ValueError, TypeError)) as caught:
            eval(call, namespace)
        assert message in str(caught.value)
        assert isinstance(caught.value, Warning) == bool(star)


@pytest.mark.parametrize(
    "name",
    [
        "image.threshold_img",
        "regions.connected_regions",
        "plotting.plot_stat_map",
        "plotting.plot_prob_atlas",
    ],
)
def test_signatures_are_nilearns_but_for_what_the_page_names(name):
    module, function = name.split(".")
    theirs = getattr(importlib.import_module(f"nilearn.{module}"), function)
    ours = getattr(importlib.import_module(f"gpuroi.{module}"), function)
    page = (ROOT / "docs" / "deviations.md").read_text()
    theirs, ours = inspect.signature(theirs).parameters, inspect.signature(ours).parameters
    shared = [one for one in theirs if one in ours]
    assert shared == [one for one in ours if one in theirs]  # in this order
    assert set(ours) - set(theirs) <= {"backend"}
    for missing in set(theirs) - set(ours) - {"kwargs"}:
        assert f"`{missing}`" in page
    others = {one for one in shared if str(theirs[one].default) != str(ours[one].default)}
    told = {"cmap", "linewidths", "bg_img"}  # nilearn's template is our "auto"
    assert others <= (told if function == "plot_prob_atlas" else {"bg_img"})


@pytest.mark.slow
def test_a_type_checker_agrees_with_the_readme(tmp_path):
    pytest.importorskip("mypy")
    script = tmp_path / "readme.py"
    blocks = PYTHON_BLOCK.findall((ROOT / "README.md").read_text())
    script.write_text("\n".join(blocks))
    command = [sys.executable, "-m", "mypy", "--ignore-missing-imports", str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_example_draws_its_pictures_offline(tmp_path):
    offline = {
        "https_proxy": "http://127.0.0.1:9",
        "GPUROI_DATA": str(tmp_path),
        "MPLBACKEND": "agg",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            ROOT / "docs/examples/extract_regions.py",
            tmp_path / "out",
        ],
        env=os.environ | offline,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Going on with the sample that nilearn brings" in done.stderr
    assert_pictures(tmp_path / "out", ROOT / "docs/images")

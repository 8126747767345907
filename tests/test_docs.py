"""Every example in a docstring or in Markdown runs and prints what it says."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import gpuroi

ROOT = Path(__file__).parents[1]
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(gpuroi.__path__, "gpuroi.")
    if name != "gpuroi.testing"
]
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, monkeypatch):
    monkeypatch.setenv("GPUROI_BACKEND", "cpu")
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


@pytest.mark.parametrize("page", ["README.md", *sorted(p.name for p in ROOT.glob("docs/*.md"))])
def test_python_blocks_of_pages_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = ROOT / page if page == "README.md" else ROOT / "docs" / page
    namespace = {}
    for block in PYTHON_BLOCK.findall(path.read_text()):
        exec(compile(block, str(path), "exec"), namespace)


def test_public_functions_have_an_example():
    for name in ("extract_regions", "available_backends"):
        assert ">>> " in getattr(gpuroi, name).__doc__
    for module in (gpuroi.arrays, gpuroi.image, gpuroi.regions, gpuroi.datasets):
        for name in module.__all__:
            assert ">>> " in getattr(module, name).__doc__

"""What an import loads, and what it does not."""

import subprocess
import sys

import pytest

import gpuroi


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("module", ["gpuroi", "gpuroi.cli", "gpuroi.errors", "gpuroi.backends"])
def test_heavy_packages_wait_until_they_are_used(module):
    heavy = {"cupy", "cupyx", "cucim", "nibabel", "matplotlib", "pandas", "nilearn", "cc3d"}
    loaded = run(f"import {module}, sys; print(*sys.modules)")
    assert not heavy & {name.partition(".")[0] for name in loaded}


def test_processes_of_a_cohort_load_what_they_need():
    """Each of them does: half a second, and a hundred megabytes, for nothing."""
    loaded = run("import gpuroi.cohort, sys; print(*sys.modules)")
    heavy = {"cupy", "matplotlib", "pandas", "nilearn", "PIL", "distributed", "gpuroi.report"}
    assert heavy.isdisjoint(loaded)


def test_the_package_is_a_program_too():
    done = subprocess.run(
        [sys.executable, "-m", "gpuroi", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"gpuroi {gpuroi.__version__}\n"


def test_importing_gpuroi_loads_no_numpy_either():
    assert "numpy" not in run("import gpuroi, sys; print(*sys.modules)")


def test_a_star_import_needs_no_extra():
    code = (
        "import sys; sys.modules.update(pytest=None, nilearn=None); from gpuroi import *; print(1)"
    )
    assert run(code) == ["1"]


def test_each_public_name_is_there_in_a_fresh_process():
    code = (
        "import gpuroi, importlib\nfor name in gpuroi.__all__: getattr(gpuroi, name); print(name)"
    )
    assert run(code) == gpuroi.__all__


def test_public_names_are_there_when_asked_for():
    assert dir(gpuroi) == sorted(gpuroi.__all__)
    for name in gpuroi.__all__:
        assert getattr(gpuroi, name) is not None
    with pytest.raises(AttributeError, match="module 'gpuroi' has no attribute 'nothing'"):
        _ = gpuroi.nothing

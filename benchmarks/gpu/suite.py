"""The contract suite, with CuPy's verbs and with the kernels."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import CUPY, OWN, without_paths
from benchmarks.gpu.records import ROOT, Run
from benchmarks.gpu.work import REQUIRED, SUITE
from gpuroi.backends import cuda

#: Test files of the contract, and what they need besides NumPy, SciPy and pytest.
TESTS = {
    "tests/test_backends.py": (),
    "tests/test_arrays.py": (),
    "tests/test_kernels_on_gpu.py": (),
    "tests/test_extract.py": ("nibabel", "nilearn", "pandas", "isal"),
    "tests/test_local_regions.py": ("nibabel", "nilearn", "isal", "threadpoolctl"),
}
CUCIM_TEST = "tests/test_backends.py::test_cucim_labels_agree_with_the_cuda_backend"

# Of the last line that pytest says.
_OUTCOMES = re.compile(r"(\d+) ([a-z]+)(?=,| in )")


def run_suite(run: Run, files: Mapping[str, Sequence[str]] = TESTS) -> None:
    """Run the contract suite with CuPy's verbs and with the kernels, both at once."""
    missing = run.device.missing
    if "pytest" in missing:
        run.add(case=SUITE, stage="all", contender="-", skipped="pytest is missing")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if missing.keys() & {"nibabel", "nilearn"}:
        command.append("--noconftest")  # it imports them; files that use its fixtures stay out
    if "cucim" in missing:
        command += ["--deselect", CUCIM_TEST]
        run.add(case=SUITE, stage="cuCIM's test", contender="-", skipped=missing["cucim"])
    chosen = []
    for file, needed in files.items():
        if absent := ", ".join(name for name in needed if name in missing):
            skipped = f"{absent} missing"
            run.add(case=SUITE, stage=Path(file).stem, contender="-", skipped=skipped)
        else:
            chosen.append(file)
    if not chosen:
        return
    timeout_s = max(1.0, run.ends_at - time.monotonic())

    def pytest(choice: str) -> dict[str, Any]:
        variables = {"GPUROI_REQUIRE": "cuda", cuda.ENVIRONMENT_VARIABLE: choice}
        options: Any = {"cwd": ROOT, "env": os.environ | variables, "timeout": timeout_s}
        try:
            done = subprocess.run([*command, *chosen], capture_output=True, text=True, **options)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {timeout_s:.0f} s"}
        lines = done.stdout.splitlines() or done.stderr.splitlines()[-1:] or ["no output"]
        tests = {outcome: int(n) for n, outcome in _OUTCOMES.findall(lines[-1])}
        if done.returncode == 0 and tests.get("passed"):
            return {"tests": tests}
        broken = [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-1:]
        return {"tests": tests, "failed": without_paths("; ".join(broken))[:2000]}

    choices = {CUPY: "library", OWN: "own"}
    with ThreadPoolExecutor(len(choices)) as pool:
        outcomes = list(pool.map(pytest, choices.values()))
    for name, outcome in zip(choices, outcomes, strict=True):
        run.add(case=SUITE, stage=REQUIRED, contender=name, **outcome)

"""The CUDA run: the contract suite, then every stage against CuPy, cuCIM and the CPU backend.

python -m benchmarks.gpu

A line goes to results/gpu.jsonl the moment it is measured; a table comes last. Needs a GPU, NumPy,
SciPy and CuPy: what else is not importable, and what no time is left for, is skipped by name.
"""

import argparse
import contextlib
import gzip
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import statistics
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np

from gpuroi.algorithms.threshold import cutoff_above, one_sided, percentile_scores
from gpuroi.backends import Backend, LabelledVoxels, cuda, get_backend
from gpuroi.errors import BackendUnavailableError
from gpuroi.types import Array, FloatArray

ROOT = Path(__file__).parents[1]

CPU, OWN, CUPY = "CPU backend", "own kernels", "CuPy"
CUPY_SINGLY, CUCIM_SINGLY = "CuPy, one by one", "cuCIM, one by one"
DOOR, BY_HAND = "extract_regions", "threads and verbs"
FILES, REQUIRED = "end-to-end", "GPUROI_REQUIRE=cuda"

PERCENTILE, MIN_REGION_MM3, FWHM_MM, SEED_DISTANCE_VOXELS = 97.0, 200.0, 6.0, 10
SEED_FLOOR = 0.1  # of gpuroi.algorithms.local_regions, which needs threadpoolctl

MOST_REPEATS, REPEAT_S = 21, 1.5  # a measurement ends with whichever comes first
CPU_MAPS, PEER_MAPS = 8, 32  # of a batch, for those that take map after map
RESERVE_S = 20.0  # of the budget, for what is under way to end
STAGE_NEEDS_S = 5.0

#: Test files of the contract, and what they need besides NumPy, SciPy and pytest.
SUITE = {
    "tests/test_backends.py": (),
    "tests/test_arrays.py": (),
    "tests/test_extract.py": ("nibabel", "nilearn", "pandas", "isal"),
    "tests/test_local_regions.py": ("nibabel", "nilearn", "isal", "threadpoolctl"),
}
_CUCIM_TEST = "tests/test_backends.py::test_cucim_labels_agree_with_the_cuda_backend"
_OPTIONAL = ("pytest", "nibabel", "nilearn", "pandas", "isal", "threadpoolctl", "cc3d")
_PACKAGES = ("cucim-cu13", "cucim-cu12", "pytest", "nibabel", "isal", "connected-components-3d")

_OUTCOMES = re.compile(r"(\d+) ([a-z]+)(?=,| in )")
_PATH = re.compile(r"(?:/[\w.@+-]+){2,}")

Elapsed = Callable[[Callable[[], Any]], tuple[float, Any]]  # seconds of a call, and its result


@dataclass(frozen=True)
class Case:
    """Maps of one size, the stages they go through, and the seconds that takes at most."""

    name: str
    n_maps: int
    shape: tuple[int, int, int]
    voxel_mm: float
    needs_s: float
    stages: tuple[str, ...] = ("order_statistics", "components")

    @property
    def min_voxels(self) -> int:
        """Voxels of the smallest region that is kept."""
        return math.ceil(MIN_REGION_MM3 / self.voxel_mm**3)

    def record(self) -> dict[str, Any]:
        """Return what a record says of the maps."""
        return {"case": self.name, "maps": self.n_maps, "shape": self.shape}


_ALL = ("order_statistics", "components", "component_voxels", "smooth", "local_maxima")
#: Most important first: whatever the time does not suffice for comes last.
CASES = (
    Case("2mm-1000", 1000, (91, 109, 91), 2.0, 40, _ALL),
    Case(FILES, 512, (91, 109, 91), 2.0, 40),
    Case("3mm-10000", 10_000, (53, 63, 46), 3.0, 40, _ALL),
    Case("1024cubed", 1, (1024, 1024, 1024), 1.0, 60),
    Case("1mm-1", 1, (182, 218, 182), 1.0, 15),
    Case("2mm-256", 256, (91, 109, 91), 2.0, 15),
    Case("2mm-16", 16, (91, 109, 91), 2.0, 10),
    Case("2mm-1", 1, (91, 109, 91), 2.0, 10),
)


@dataclass(frozen=True)
class Device:
    """All that differs between a GPU and a rehearsal without one."""

    xp: ModuleType
    ndimage: Any
    backends: dict[str, Backend]  # the CPU first: the others have to say what it says
    peers: dict[str, Callable[[Array], Array]]  # from a volume's foreground to its labels
    missing: dict[str, str]  # what cannot be imported, and why
    elapsed: Elapsed  # of work on the device
    free: Callable[[], None]  # hands unused memory back


@dataclass
class Run:
    """What all measurements share: where, until when, and the records there are so far."""

    device: Device
    output: Path
    ends_at: float
    circumstances: dict[str, Any]
    copy_bytes_s: float | None = None  # read and written
    records: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **record: Any) -> None:
        """Write a record down at once: a run that is killed keeps what it had."""
        self.records.append(record)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        with self.output.open("a") as lines:
            lines.write(json.dumps(record | {"date": date} | self.circumstances) + "\n")
        print(row(record), flush=True)

    def attempt(
        self,
        work: Callable[[], dict[str, Any] | None],
        needs_s: float = STAGE_NEEDS_S,
        **record: Any,
    ) -> None:
        """Add what `work` measures, or why it has not: one failure silences no others."""
        outcome: dict[str, Any] | None
        if (left_s := self.ends_at - time.monotonic()) < needs_s:
            self.add(**record, skipped=f"{max(0, left_s):.0f} s left, {needs_s:.0f} s needed")
            return
        try:
            outcome = work()
        except MemoryError:
            outcome = {"skipped": "out of memory"}
        except Exception as error:
            outcome = {"failed": _reason(error)}
        if outcome is not None:
            self.add(**record, **outcome)
        with contextlib.suppress(Exception):  # a device that has failed refuses even this
            self.device.free()

    def find(self, case: str, stage: str, contender: str) -> dict[str, Any] | None:
        """Return the record of this measurement."""
        for record in self.records:
            names = (record["case"], record["stage"], record["contender"])
            if names == (case, stage, contender) and "median_s" in record:
                return record
        return None

    def answers(self, *stages: str) -> list[bool]:
        """Return what the comparisons of these stages have shown; of all by default."""
        compared = [record for record in self.records if record.get("compared_maps")]
        return [r["identical"] for r in compared if not stages or r["stage"] in stages]


def _reason(error: BaseException) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return _PATH.sub("<path>", f"{type(error).__name__}: {first}")[:300]


@dataclass(frozen=True)
class Batch:
    """Maps of a case, and what the verbs are asked about them."""

    maps: Array  # (B, X, Y, Z) float32
    ranks: np.ndarray  # (B, 2)
    cutoffs: FloatArray  # (B,)
    floors: FloatArray  # (B,)
    sigma_voxels: tuple[float, float, float]
    min_voxels: int

    def of(self, volumes: range) -> "Batch":
        """Return the part with these volumes."""
        where = slice(volumes.start, volumes.stop, volumes.step)
        host = {name: getattr(self, name)[where].copy() for name in ("ranks", "cutoffs", "floors")}
        return replace(self, maps=self.maps[where], **host)


def _thresholded(backend: Backend, batch: Batch) -> Batch:
    (side,) = one_sided(backend, batch.maps, batch.cutoffs, "positive")
    return replace(batch, maps=side)


def _smoothed(backend: Backend, batch: Batch) -> Batch:
    maps = backend.smooth(batch.maps, batch.sigma_voxels)
    highest = backend.to_host(maps.max(axis=(1, 2, 3)))
    return replace(batch, maps=maps, floors=highest * highest.dtype.type(SEED_FLOOR))


def _regions(verb: str) -> Callable[[Any, Batch], Any]:
    return lambda to, b: getattr(to, verb)(b.maps, b.cutoffs, "both", 6, b.min_voxels)


@dataclass(frozen=True)
class Stage:
    """A verb on a batch; `prepare` makes its maps of those of the stage before."""

    bytes_per_voxel: int  # the least that has to be moved
    run: Callable[[Any, Batch], Any]
    prepare: Callable[[Backend, Batch], Batch] = lambda _, batch: batch


STAGES = {
    "order_statistics": Stage(12, lambda to, b: to.order_statistics(b.maps, b.ranks, True, None)),
    "components": Stage(24, _regions("components")),
    "component_voxels": Stage(24, _regions("component_voxels")),
    "smooth": Stage(24, lambda to, b: to.smooth(b.maps, b.sigma_voxels), _thresholded),
    "local_maxima": Stage(
        8, lambda to, b: to.local_maxima(b.maps, SEED_DISTANCE_VOXELS, b.floors), _smoothed
    ),
}


def wall_clock(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call took on the host, and its result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def cuda_device() -> Device:
    """Return the current CUDA device; raise `BackendUnavailableError` where there is none."""

    def with_kernels(choice: str) -> Backend:
        with mock.patch.dict(os.environ, {cuda.ENVIRONMENT_VARIABLE: choice}):
            return cuda.load()

    backends = {CPU: get_backend("cpu"), OWN: with_kernels("own"), CUPY: with_kernels("library")}
    import cupy
    from cupyx.scipy import ndimage

    def by_events(work: Callable[[], Any]) -> tuple[float, Any]:
        cupy.cuda.get_current_stream().synchronize()
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        result = work()
        end.record()
        end.synchronize()
        return cupy.cuda.get_elapsed_time(start, end) / 1e3, result

    peers, missing = find_peers(lambda mask: ndimage.label(mask)[0])
    free = cupy.get_default_memory_pool().free_all_blocks
    return Device(cupy, ndimage, backends, peers, missing, by_events, free)


def find_peers(label: Callable[[Array], Array]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the functions that label one volume, and what cannot be imported here."""
    absent = [name for name in _OPTIONAL if importlib.util.find_spec(name) is None]
    missing = dict.fromkeys(absent, "not installed")
    peers = {CUPY_SINGLY: label}
    try:
        measure = importlib.import_module("cucim.skimage.measure")
        peers[CUCIM_SINGLY] = partial(measure.label, connectivity=1)
    except Exception as error:  # a broken installation raises whatever it trips over
        missing["cucim"] = _reason(error)
    return peers, missing


def circumstances(device: Device, commit: str | None, quick: bool) -> dict[str, Any]:
    """Return on what and with what the records are made."""

    def git(*arguments: str) -> str:
        if shutil.which("git") is None:
            return ""
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()

    versions = dict(device.backends[CUPY].versions())
    versions.pop("cuda-kernels", None)
    installed = {one.name: one.version for one in importlib.metadata.distributions()}
    versions |= {name: installed[name] for name in _PACKAGES if name in installed}
    return {
        "commit": git("rev-parse", "--short", "HEAD") or commit,
        "uncommitted_changes": bool(
            git("status", "--porcelain", "--", "gpuroi", "benchmarks/*.py")
        ),
        "device": device.backends[CUPY].device,
        "processor": device.backends[CPU].device,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
        "missing": sorted(device.missing),
        "quick": quick,
    }


def run_suite(run: Run, files: Mapping[str, Sequence[str]] = SUITE) -> None:
    """Run the contract suite with CuPy's verbs and with the kernels, both at once."""
    missing = run.device.missing
    if "pytest" in missing:
        run.add(case="suite", stage="all", contender="-", skipped="pytest is missing")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if missing.keys() & {"nibabel", "nilearn"}:
        command.append("--noconftest")  # it imports them; files that use its fixtures stay out
    if "cucim" in missing:
        command += ["--deselect", _CUCIM_TEST]
        run.add(case="suite", stage="cuCIM's test", contender="-", skipped=missing["cucim"])
    chosen = []
    for file, needed in files.items():
        if absent := ", ".join(name for name in needed if name in missing):
            skipped = f"{absent} missing"
            run.add(case="suite", stage=Path(file).stem, contender="-", skipped=skipped)
        else:
            chosen.append(file)
    if not chosen:
        return
    timeout_s = max(1.0, (run.ends_at - time.monotonic()) / 2)

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
        return {"tests": tests, "failed": _PATH.sub("<path>", "; ".join(broken))[:2000]}

    choices = {CUPY: "library", OWN: "own"}
    with ThreadPoolExecutor(len(choices)) as pool:
        outcomes = list(pool.map(pytest, choices.values()))
    for name, outcome in zip(choices, outcomes, strict=True):
        run.add(case="suite", stage=REQUIRED, contender=name, **outcome)


def repeat(elapsed: Elapsed, works: Sequence[Callable[[], Any]], *known_s: float) -> list[float]:
    """Return the seconds of all `works` together, time after time, until a limit is reached."""
    seconds = list(known_s)
    while len(seconds) < MOST_REPEATS and sum(seconds) < REPEAT_S:
        seconds.append(sum(elapsed(work)[0] for work in works))
    return seconds


def _times(seconds: list[float], timed_maps: int) -> dict[str, Any]:
    """Return the times of a record; where not all maps were timed, the others last as long."""
    median_s = statistics.median(seconds)
    times = {"median_s": median_s, "repeats": len(seconds), "timed_maps": timed_maps}
    return times | {"maps_per_s": timed_maps / median_s}


def measure_copy(run: Run, n_bytes: int) -> dict[str, Any]:
    """Measure the bytes that a copy on the device reads and writes a second."""
    source = run.device.xp.zeros(n_bytes // 4, np.float32)
    copy = partial(run.device.xp.copyto, run.device.xp.empty_like(source), source)
    copy()
    times = _times(repeat(run.device.elapsed, [copy]), 1)
    run.copy_bytes_s = 2 * n_bytes / times["median_s"]
    return times | {"bytes": n_bytes, "bytes_per_s": run.copy_bytes_s}


def smooth_noise(device: Device, shape: tuple[int, int, int], seed: int) -> Array:
    """Return hashed indices, smoothed by two box filters to noise of standard deviation 1."""
    xp = device.xp
    bits = xp.arange(math.prod(shape), dtype=np.uint32)
    bits += np.uint32(seed * 0x9E3779B9 % 2**32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits ^= bits >> np.uint32(shift)
        bits *= np.uint32(factor)
    noise = (bits.astype(np.float32) / np.float32(2**32) - np.float32(0.5)).reshape(shape)
    for _ in range(2):
        noise = device.ndimage.uniform_filter(noise, 5, mode="wrap")
    return noise / xp.std(noise)


def make_batch(device: Device, case: Case) -> Batch:
    """Return maps that are smooth noise in an ellipsoid and zero outside, no two alike."""
    xp = device.xp
    distinct = [smooth_noise(device, case.shape, seed) for seed in range(min(4, case.n_maps))]
    across = (((xp.arange(n, dtype=np.float32) + 0.5) / n - 0.5) / 0.42 for n in case.shape)
    x, y, z = (axis**2 for axis in across)
    inside = x[:, None, None] + y[:, None] + z <= 1
    maps = xp.empty((case.n_maps, *case.shape), np.float32)
    for b in range(case.n_maps):
        turn, which = divmod(b, len(distinct))
        rolled = xp.roll(distinct[which], (7 * turn, 3 * turn, 5 * turn), (0, 1, 2))
        scale = np.float32((1 + b % 17 / 16) * (-1) ** turn)
        maps[b] = xp.where(inside, rolled * scale, np.float32(0))
    scores, _ = percentile_scores(device.backends[CUPY], maps, PERCENTILE, "both")
    cutoffs = cutoff_above(scores, maps.dtype)
    place = PERCENTILE / 100 * (math.prod(case.shape) - 1)
    ranks = np.tile([int(place), math.ceil(place)], (case.n_maps, 1))
    sigma = FWHM_MM / (math.sqrt(8 * math.log(2)) * case.voxel_mm)
    return Batch(maps, ranks, cutoffs, np.zeros_like(cutoffs), (sigma,) * 3, case.min_voxels)


def every_nth(n_maps: int, at_most: int) -> range:
    """Return at most so many volumes, evenly spaced, the last one among them."""
    step = math.ceil(n_maps / at_most)
    return range((n_maps - 1) % step, n_maps, step)


def identical(one: Any, other: Any) -> bool:
    """Return whether two results have the same shapes, dtypes and bits, wherever they lie."""
    if isinstance(one, LabelledVoxels):
        one, other = ([v.index, v.label, np.array(v.n_regions)] for v in (one, other))
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(identical, one, other))
    if type(one) is not type(other):
        one, other = _on_host(one), _on_host(other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype.kind == "f":
        one, other = (array.view(f"i{array.dtype.itemsize}") for array in (one, other))
    return bool(_on_host((one == other).all()))


def _on_host(array: Array) -> Any:
    return array.get() if hasattr(array, "get") else array


def compete(run: Run, case: Case, name: str, batch: Batch) -> None:
    """Time a stage by every contender and compare what they say, volume by volume."""
    known: dict[int, Any] = {}  # what was said of a volume first
    for contender in run.device.backends:
        work = partial(_in_pieces, run, contender, STAGES[name], batch, known)
        run.attempt(work, **case.record(), stage=name, contender=contender)


def _in_pieces(
    run: Run, contender: str, stage: Stage, batch: Batch, known: dict[int, Any]
) -> dict[str, Any]:
    """Return the measurement of a contender, on halves of the batch where memory demands it."""
    n_maps = size = len(batch.maps)
    if contender == CPU:
        parts = [range(b, b + 1) for b in every_nth(n_maps, CPU_MAPS)]
        return _measured(run, contender, stage, batch, known, parts)
    while True:
        parts = [range(b, min(b + size, n_maps)) for b in range(0, n_maps, size)]
        try:
            return _measured(run, contender, stage, batch, known, parts)
        except MemoryError:
            if size == 1:
                raise
        run.device.free()
        size = math.ceil(size / 2)


def _measured(
    run: Run,
    contender: str,
    stage: Stage,
    batch: Batch,
    known: dict[int, Any],
    parts: list[range],
) -> dict[str, Any]:
    """Compare what is said of `parts` of a batch, then time that; `known` gets what is new."""
    backend, on_host = run.device.backends[contender], contender == CPU
    elapsed = wall_clock if on_host else run.device.elapsed
    inputs = [batch.of(volumes) for volumes in parts]
    if on_host:
        inputs = [replace(i, maps=run.device.backends[CUPY].to_host(i.maps)) for i in inputs]
    works = [partial(stage.run, backend, part) for part in inputs]
    new: dict[int, Any] = {}
    first_s, n_compared, wrong = 0.0, 0, []
    for volumes, work in zip(parts, works, strict=True):
        seconds, result = elapsed(work)  # compiles, too
        first_s += seconds
        for k, b in enumerate(volumes):
            said = tuple(r[k] for r in result) if isinstance(result, tuple) else result[k]
            if b not in known:
                new[b] = said
                continue
            n_compared += 1
            if not identical(said, known[b]):
                wrong.append(b)
        del result, said
    times = _times(repeat(elapsed, works, *[first_s] * on_host), sum(map(len, parts)))
    known |= new
    bytes_s = stage.bytes_per_voxel * math.prod(batch.maps.shape[1:]) * times["maps_per_s"]
    if run.copy_bytes_s is not None and not on_host:
        times["share_of_copy"] = bytes_s / run.copy_bytes_s
    if n_compared > 0:
        times["identical"] = not wrong
    more = {"compared_maps": n_compared, "differing_maps": wrong[:10], "pieces": len(parts)}
    return times | more | {"bytes_per_voxel": stage.bytes_per_voxel}


def label_one_by_one(run: Run, case: Case, batch: Batch) -> None:
    """Time libraries that label one volume a call: no threshold, no second sign, no size filter."""
    device = run.device
    part = batch.of(every_nth(case.n_maps, PEER_MAPS))
    maps = device.xp.ascontiguousarray(part.maps)
    expected, _ = device.backends[OWN].components(maps, part.cutoffs, "positive", 6, 1)
    foreground = list(maps >= device.xp.asarray(part.cutoffs).reshape(-1, 1, 1, 1))

    def measured(label: Callable[[Array], Array]) -> dict[str, Any]:
        found = [label(mask).astype(np.int32) for mask in foreground]
        outcome = {"identical": identical(found, list(expected)), "compared_maps": len(found)}
        del found
        times = repeat(device.elapsed, [lambda: [label(mask) for mask in foreground]])
        return _times(times, len(foreground)) | outcome

    for name in (CUPY_SINGLY, CUCIM_SINGLY):
        record = case.record() | {"stage": "labels", "contender": name}
        if name in device.peers:
            run.attempt(partial(measured, device.peers[name]), **record)
        else:
            run.add(**record, skipped=device.missing["cucim"])


def run_case(run: Run, case: Case) -> None:
    """Send one batch through the stages of its case."""
    batch = make_batch(run.device, case)
    for name in case.stages:
        batch = STAGES[name].prepare(run.device.backends[OWN], batch)
        compete(run, case, name, batch)
        if name == "components":
            record = case.record() | {"stage": "labels", "contender": "-"}
            run.attempt(partial(label_one_by_one, run, case, batch), **record)


def nifti_header(shape: tuple[int, int, int], voxel_mm: float) -> bytes:
    """Return the 352 bytes before the voxels of a float32 NIfTI-1 file."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, *shape, 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, 16, 32)  # float32
    struct.pack_into("<8f", header, 76, 1, *[voxel_mm] * 3, 1, 1, 1, 1)
    struct.pack_into("<2f", header, 108, 352, 1)  # where the voxels begin, and their slope
    struct.pack_into("<h", header, 254, 1)  # the affine is in the rows that follow
    struct.pack_into("<12f", header, 280, *(np.eye(3, 4) * voxel_mm).ravel())
    header[344:348] = b"n+1\0"
    return bytes(header)


def codec() -> tuple[str, Callable[[bytes], bytes], Callable[[bytes], bytes]]:
    """Return the name of the fastest gzip there is, and how it compresses and decompresses."""
    try:
        from isal import igzip
    except ImportError:
        return "zlib", partial(gzip.compress, compresslevel=1), partial(zlib.decompress, wbits=31)
    return "isal", partial(igzip.compress, compresslevel=1), igzip.decompress


def run_files(run: Run, case: Case) -> None:
    """Time compressed files in, regions out, against the decoder alone."""
    backend, threads = run.device.backends[OWN], os.cpu_count() or 1
    batch = make_batch(run.device, case)
    host = backend.to_host(batch.maps)
    volumes = every_nth(case.n_maps, CPU_MAPS)
    sample = replace(batch.of(volumes), maps=host[volumes.start :: volumes.step])
    expected = list(STAGES["components"].run(run.device.backends[CPU], sample)[0])
    del batch
    run.device.free()
    library, compress, decompress = codec()
    header = nifti_header(case.shape, case.voxel_mm)

    def decode(path: Path) -> FloatArray:
        voxels = np.frombuffer(decompress(path.read_bytes()), "<f4", offset=len(header))
        return voxels.reshape(case.shape, order="F")

    def decode_all(n_threads: int) -> None:
        with ThreadPoolExecutor(n_threads) as pool:
            for _ in pool.map(decode, paths):
                pass

    def door() -> Callable[[int], Array]:
        from gpuroi.extract import extract_regions

        options: Any = {"min_region_size": MIN_REGION_MM3, "backend": backend}
        found: Any = extract_regions(paths, f"{PERCENTILE:g}%", **options)
        return lambda b: found[b].labels

    def measured(work: Callable[[], Any], n_threads: int | None = None) -> dict[str, Any]:
        labels, outcome = work(), {"threads": n_threads}
        if labels is not None:
            outcome["identical"] = identical([labels(b) for b in volumes], expected)
            outcome["compared_maps"] = len(volumes)
            del labels
        return _times(repeat(wall_clock, [work]), case.n_maps) | outcome

    def write(path: Path, volume: FloatArray) -> None:
        path.write_bytes(compress(header + volume.tobytes(order="F")))

    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > 2 * host.nbytes
    with TemporaryDirectory(dir=memory if has_room else None) as folder:
        paths = [Path(folder) / f"{b}.nii.gz" for b in range(case.n_maps)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(write, paths, host))
        record = case.record() | {"stage": library}
        for n in sorted({1, threads}, reverse=True):
            work = partial(measured, partial(decode_all, n), n)
            run.attempt(work, contender=f"decoder x{n}", **record)
        by_hand = partial(regions_by_hand, backend, paths, decode, case)
        run.attempt(partial(measured, by_hand, threads), contender=BY_HAND, **record)
        needed = ("nibabel", "isal", "threadpoolctl")
        if absent := ", ".join(name for name in needed if name in run.device.missing):
            run.add(**record, contender=DOOR, skipped=f"{absent} missing")
        else:
            run.attempt(partial(measured, door), contender=DOOR, **record)


def regions_by_hand(
    backend: Backend, paths: list[Path], decode: Callable[[Path], FloatArray], case: Case
) -> Callable[[int], Array]:
    """Decode in threads, find regions batch by batch; return what gives the labels of a map."""
    size = max(1, backend.batch_bytes // (4 * math.prod(case.shape)))
    found: list[LabelledVoxels] = []

    def find(arrived: Callable[[], Array]) -> None:
        maps = arrived()
        scores, _ = percentile_scores(backend, maps, PERCENTILE, "both")
        cutoffs = cutoff_above(scores, maps.dtype)
        found.extend(backend.component_voxels(maps, cutoffs, "both", 6, case.min_voxels))

    def fill(host: FloatArray, k: int, path: Path) -> None:
        host[k] = decode(path)

    def labels(b: int) -> Array:
        volume = np.zeros(case.shape, np.int32)
        volume.ravel()[found[b].index] = found[b].label
        return volume

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        batches = []
        for some in (paths[start : start + size] for start in range(0, len(paths), size)):
            host = np.empty((len(some), *case.shape), np.float32)
            batches.append((host, [pool.submit(fill, host, k, p) for k, p in enumerate(some)]))
        on_their_way = []
        for host, filling in batches:
            for one in filling:
                one.result()
            on_their_way.append(backend.upload(host))  # beside the kernels of the batch before
            if len(on_their_way) == 2:
                find(on_their_way.pop(0))
        find(on_their_way.pop())
    return labels


def row(record: dict[str, Any]) -> str:
    """Return a record as a line of the table."""
    line = f"{record['case']:10} {record['stage']:18} {record['contender']:20}"
    notes = [f"{n} {outcome}" for outcome, n in record.get("tests", {}).items()]
    notes += [f"{word}: {record[word]:.300}" for word in ("skipped", "failed") if word in record]
    if "bytes_per_s" in record:
        notes.append(f"{record['bytes_per_s'] / 1e9:.0f} GB/s read and written")
    if notes:
        return f"{line} {', '.join(notes)}"
    scale = record["maps"] / record["timed_maps"]
    time_ms = f"{'~' if scale != 1 else ''}{record['median_s'] * scale * 1e3:.3f} ms"
    share = record.get("share_of_copy")
    copy = "" if share is None else f"{share:.1%}"
    same = {True: "yes", False: "NO", None: "-"}[record.get("identical")]
    return f"{line} {time_ms:>14} {record['maps_per_s']:11.1f} {copy:>7} {same:>9}"


HEADING = f"{'case':10} {'stage':18} {'contender':20} {'time':>14} {'maps/s':>11} of copy identical"


def promises(run: Run, used_s: float, budget_s: float) -> Iterator[tuple[str, bool | None]]:
    """Yield each promise with what was measured, and whether it was kept (None: not measured)."""
    first = CASES[0].name

    def kept(text: str, figure: float | None, least: float) -> tuple[str, bool | None]:
        if figure is None:
            return f"{text} >= {least:g}", None
        return f"{text} >= {least:g}: {figure:.2f}", figure >= least

    def ratio(one: dict[str, Any] | None, other: dict[str, Any] | None) -> float | None:
        return one["maps_per_s"] / other["maps_per_s"] if one and other else None

    own = run.find(first, "components", OWN)
    share = own["share_of_copy"] if own else None
    yield kept(f"{first}: components, share of 24 B/voxel at copy bandwidth", share, 0.5)
    for peer in (CUCIM_SINGLY, CUPY_SINGLY):  # the second are the same kernels as the first
        text = f"{first}: components, times {peer}"
        yield kept(text, ratio(own, run.find(first, "labels", peer)), 20)
    cpu = run.find(first, "components", CPU)
    yield kept(f"{first}: components, times {CPU} on one core", ratio(own, cpu), 500)
    files = {r["contender"]: r for r in run.records if r["case"] == FILES and "median_s" in r}
    end = files.pop(BY_HAND, None)
    end = files.pop(DOOR, end)
    for name, decoder in files.items():
        text = f"{FILES}: {end['contender'] if end else DOOR}, share of {name}"
        yield kept(text, ratio(end, decoder), 0.9)
    for verb in STAGES:  # not promised, but PROVEN in gpuroi/backends/cuda.py depends on it
        figure = ratio(run.find(first, verb, OWN), run.find(first, verb, CUPY))
        text, is_faster = kept(f"{first}: {verb}, identical in all cases, times {CUPY}", figure, 1)
        yield text, is_faster and all(run.answers(verb))
    same = run.answers()
    yield f"identical in {sum(same)} of {len(same)} comparisons", all(same) if same else None
    good = ["failed" not in record for record in run.records if record["stage"] == REQUIRED]
    yield f"contract suite: {sum(good)} of {len(good)} passed", all(good) if good else None
    yield f"ended after {used_s:.0f} s of {budget_s:.0f} s", used_s <= budget_s


def main(
    arguments: list[str] | None = None, find_device: Callable[[], Device] = cuda_device
) -> int:
    """Run everything; return 1 if something failed or was not identical, 2 without a GPU."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    names = ["suite", *(case.name for case in CASES)]
    parser.add_argument("--only", choices=names, action="append", help="default: all")
    parser.add_argument("--no-suite", action="store_true", help="leave the contract suite out")
    parser.add_argument("--quick", action="store_true", help="tiny maps: a rehearsal")
    parser.add_argument("--budget-s", type=float, default=480.0, help="ends within so many seconds")
    parser.add_argument("--commit", help="what to record where git does not tell")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/gpu.jsonl")
    options = parser.parse_args(arguments)
    try:
        device = find_device()
    except BackendUnavailableError as reason:
        print(f"no CUDA run: {' '.join(str(reason).split())}", file=sys.stderr)
        return 2

    ends_at = started + options.budget_s - RESERVE_S
    run = Run(device, options.output, ends_at, circumstances(device, options.commit, options.quick))
    chosen = options.only or names[options.no_suite :]
    if "suite" in chosen:
        run_suite(run)
    work = partial(measure_copy, run, 2**20 if options.quick else 2**32)
    run.attempt(work, case="copy", stage="on the device", contender="copyto")
    for case in CASES:
        if case.name not in chosen:
            continue
        if options.quick:
            tiny: dict[str, Any] = {"n_maps": min(case.n_maps, 3), "shape": (11, 12, 13)}
            case = replace(case, voxel_mm=4.0, needs_s=STAGE_NEEDS_S, **tiny)
        work = partial(run_files if case.name == FILES else run_case, run, case)
        run.attempt(work, case.needs_s, **case.record(), stage="-", contender="-")

    print(f"\n{HEADING}")
    for record in run.records:
        print(row(record))
    for name, reason in device.missing.items():
        print(f"MISSING {name}: {reason}")
    for text, is_kept in promises(run, time.monotonic() - started, options.budget_s):
        print(f"{ {True: 'kept', False: 'NOT KEPT', None: 'not measured'}[is_kept]:12} {text}")
    return int(any("failed" in r or r.get("identical") is False for r in run.records))


if __name__ == "__main__":
    sys.exit(main())

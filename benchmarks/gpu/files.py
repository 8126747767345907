"""From compressed files to regions, against the decoder alone."""

import gzip
import os
import shutil
import struct
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.gpu.device import CPU, OWN, wall_clock
from benchmarks.gpu.records import Run, repeat, times_of
from benchmarks.gpu.stages import CPU_MAPS, VERBS, identical
from benchmarks.gpu.work import (
    BY_HAND,
    COHORT,
    DOOR,
    MIN_REGION_MM3,
    PERCENTILE,
    Case,
    every_nth,
    make_batch,
)
from gpuroi.algorithms.threshold import cutoff_above, percentile_scores
from gpuroi.backends import Backend, LabelledVoxels, Staging, cuda
from gpuroi.types import Array, FloatArray

#: Names that each file is read by, one after the other: a measurement is to last a second.
TIMES = 8
MAPS_A_BATCH = 16
BATCHES_BEING_FILLED = 2  # and one more on its way to the device, and one on it

NEEDS = {
    DOOR: ("nibabel", "isal", "threadpoolctl", "pandas"),
    COHORT: ("nibabel", "isal", "threadpoolctl", "pandas", "filelock"),
}

Found = Callable[[int], Array]  # from the place of a map among all to its labels


@dataclass(frozen=True)
class Codec:
    """The fastest gzip there is."""

    name: str
    compress: Callable[[bytes], bytes]
    decompress: Callable[..., bytes]  # of the content, wbits, and how much it will be

    @classmethod
    def find(cls) -> "Codec":
        """Return isal's, or else the standard library's."""
        try:
            from isal import igzip, isal_zlib
        except ImportError:
            compress = partial(gzip.compress, compresslevel=1)
            return cls("zlib", compress, zlib.decompress)
        return cls("isal", partial(igzip.compress, compresslevel=1), isal_zlib.decompress)


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


@dataclass(frozen=True)
class Files:
    """Compressed maps on a disk in memory, if there is one, and how they are decoded."""

    case: Case
    codec: Codec
    folder: Path
    paths: list[Path]  # of all names, several to a file

    @classmethod
    def write(cls, case: Case, folder: Path, volumes: Sequence[FloatArray]) -> "Files":
        """Write the volumes, and link each to all its names."""
        codec, header = Codec.find(), nifti_header(case.shape, case.voxel_mm)

        def write(b: int) -> None:
            first = folder / f"0-{b}.nii.gz"
            first.write_bytes(codec.compress(header + volumes[b].tobytes(order="F")))
            for turn in range(1, TIMES):
                (folder / f"{turn}-{b}.nii.gz").hardlink_to(first)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(write, range(len(volumes))))
        names = [f"{turn}-{b}.nii.gz" for turn in range(TIMES) for b in range(len(volumes))]
        return cls(case, codec, folder, [folder / name for name in names])

    def decode(self, path: Path) -> FloatArray:
        """Return a map as it lies in its file, which nothing has to turn."""
        n_voxels = int(np.prod(self.case.shape))
        content = self.codec.decompress(path.read_bytes(), wbits=31, bufsize=352 + 4 * n_voxels)
        return np.frombuffer(content, "<f4", offset=352).reshape(self.case.shape, order="F")

    def decode_all(self, n_threads: int, n_maps: int) -> None:
        """Decode so many maps, and do nothing else."""
        with ThreadPoolExecutor(n_threads) as pool:
            for _ in pool.map(self.decode, self.paths[:n_maps]):
                pass


def run_files(run: Run, case: Case) -> None:
    """Time compressed files in, regions out, against the decoder alone."""
    backend, n_threads = run.device.backends[OWN], os.cpu_count() or 1
    batch = make_batch(run.device, case)
    host = backend.to_host(batch.maps)
    sampled = every_nth(case.n_maps, CPU_MAPS)
    sample = replace(batch.of(sampled), maps=host[sampled.start :: sampled.step])
    expected = list(VERBS["components"].run(run.device.backends[CPU], sample)[0])
    del batch
    run.device.free()
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > 2 * host.nbytes
    with TemporaryDirectory(dir=memory if has_room else None) as folder:
        files = Files.write(case, Path(folder), host)
        del host
        n_maps = len(files.paths)
        # By their first names and their last: what is wrong with a stream may show late.
        places = [*sampled, *(n_maps - case.n_maps + b for b in sampled)]

        def compared(work: Callable[[], Found], turns: int | None = None) -> dict[str, Any]:
            first_s, labels = wall_clock(work)
            same = identical([labels(b) for b in places], expected * 2)
            del labels
            seconds = repeat(wall_clock, [work]) if turns is None else [first_s]
            outcome = {"identical": same, "compared_maps": len(places), "threads": n_threads}
            return times_of(seconds, n_maps) | outcome

        def decoded(n: int, n_decoded: int) -> dict[str, Any]:
            work = partial(files.decode_all, n, n_decoded)
            work()
            return times_of(repeat(wall_clock, [work]), n_decoded) | {"threads": n}

        record = case.record() | {"stage": files.codec.name, "maps": n_maps}
        for n, n_decoded in {n_threads: n_maps, 1: case.n_maps}.items():
            run.attempt(partial(decoded, n, n_decoded), contender=f"decoder x{n}", **record)
        ways: dict[str, Callable[[], dict[str, Any]]] = {
            BY_HAND: partial(compared, partial(regions_by_hand, backend, files)),
            DOOR: partial(compared, partial(_by_the_door, backend, files.paths)),
            # Once: a folder of results is not made twice, and its processes take time to start.
            COHORT: partial(compared, partial(_as_a_cohort, run.device.name, files), turns=1),
        }
        for name, way in ways.items():
            if absent := ", ".join(n for n in NEEDS.get(name, ()) if n in run.device.missing):
                run.add(**record, contender=name, skipped=f"{absent} missing")
            else:
                run.attempt(way, contender=name, **record)


def regions_by_hand(backend: Backend, files: Files) -> Found:
    """Find regions batch by batch; threads decode into the memory that the device copies from."""
    case, found = files.case, list[LabelledVoxels]()
    filling: deque[tuple[Staging, list[Future[None]]]] = deque()
    sent: deque[Callable[[], Array]] = deque()

    def fill(place: FloatArray, path: Path) -> None:
        place[...] = files.decode(path)

    def send() -> None:
        staging, fillings = filling.popleft()
        for one in fillings:
            one.result()
        sent.append(staging.send(len(fillings)))

    def find() -> None:
        maps = sent.popleft()()
        scores, _ = percentile_scores(backend, maps, PERCENTILE, "both")
        cutoffs = cutoff_above(scores, maps.dtype)
        found.extend(backend.component_voxels(maps, cutoffs, "both", 6, case.min_voxels))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files.paths), MAPS_A_BATCH):
            paths = files.paths[start : start + MAPS_A_BATCH]
            staging = backend.staging((len(paths), *case.shape), np.dtype("float32"))
            fillings = [pool.submit(fill, staging.host[k], path) for k, path in enumerate(paths)]
            filling.append((staging, fillings))
            if len(filling) > BATCHES_BEING_FILLED:
                send()
            if len(sent) > 1:  # one is copied beside the kernels of the one before
                find()
        while filling:
            send()
            find()
        while sent:
            find()

    def labels(b: int) -> Array:
        volume = np.zeros(case.shape, np.int32)
        volume.ravel()[found[b].index] = found[b].label
        return volume

    return labels


def _by_the_door(backend: Backend, paths: list[Path]) -> Found:
    from gpuroi.extract import extract_regions

    options: Any = {"min_region_size": MIN_REGION_MM3, "backend": backend}
    found: Any = extract_regions(paths, f"{PERCENTILE:g}%", **options)
    return lambda b: found[b].labels


def _as_a_cohort(backend: str, files: Files) -> Found:
    from gpuroi import io
    from gpuroi.cohort import extract_cohort
    from gpuroi.cohort._outputs import output_names

    recipe = {"threshold": f"{PERCENTILE:g}%", "min_region_size": MIN_REGION_MM3}
    out = files.folder / "out"
    with mock.patch.dict(os.environ, {cuda.ENVIRONMENT_VARIABLE: "own"}):
        report = extract_cohort(files.paths, out, recipe, backend=backend)
    if report.failures:
        raise RuntimeError(f"{len(report.failures)} failed, first: {report.failures[0].message}")

    def labels(b: int) -> Array:
        (name,) = output_names(report.records[b].stem, 1)
        (written,) = io.read_maps(out / f"{name}.nii.gz")
        return written.data.astype(np.int32)

    return labels

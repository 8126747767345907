"""What a process does with maps, in three tasks: check what is done, extract, sum up.

Every failure of a map becomes a record; only the loss of the device ends a task.
"""

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path

from threadpoolctl import threadpool_limits

from gpuroi import io
from gpuroi.backends import get_backend
from gpuroi.cohort._consumer import RemoteFinder
from gpuroi.cohort._discover import MapFile
from gpuroi.cohort._ledger import Record
from gpuroi.cohort._outputs import Written, cell, is_whole, map_name, output_names
from gpuroi.errors import (
    DeviceLostError,
    FolderInUseError,
    InvalidMapError,
    OutputChangedError,
    collected_warnings,
    warn,
)
from gpuroi.overlap import Overlap
from gpuroi.pipeline import ComputedBy, Finder, Found, Prepared, finish, in_batches, prepare
from gpuroi.recipe import Recipe

_PAIR = re.compile(r"\.(hdr|img)((?:\.gz|\.bz2)?)$")

_BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")

# Compressed bytes of maps that are held at once for a device, whatever the size of a unit.
_MOST_FILE_BYTES = 128 * 2**20

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 256 * 2**20
_MOST_MMAP_THRESHOLD = 32 * 2**20  # older ones refuse more


@dataclass(frozen=True)
class Job:
    """The parameters of a run, the same for all its maps."""

    folder: Path
    recipe: Recipe
    parameters: str  # digest
    backend: str
    cpu_if_lost: bool  # go on there when the device is lost
    version: str  # of gpuroi
    run: tuple[Path, str]  # a file, and what is in it until the next run begins


class Tools:
    """What a process keeps between units."""

    def __init__(self, job: Job, device: Connection | None = None) -> None:
        self.job = job
        self.described = job.recipe.describe()
        self._finder: Finder | RemoteFinder = (
            self._local(job.backend) if device is None else RemoteFinder(device)
        )

    def _local(self, backend: str) -> Finder:
        return Finder(self.job.recipe, get_backend(backend))

    def find(self, volumes: list[Prepared]) -> Iterator[tuple[Found, ComputedBy]]:
        """Yield what is in each of `volumes`, and where it was found.

        Raises
        ------
        DeviceLostError
            If the device no longer answers, and the CPU is not to take its place.
        """
        done = 0
        try:
            for batch in in_batches(volumes, self._finder.batch_bytes):
                where: ComputedBy = self._finder.computed_by
                for found in self._finder(batch):
                    yield found, where
                    done += 1
            return
        except RuntimeError as error:
            if self.is_host:
                raise
            if not self.job.cpu_if_lost:
                raise DeviceLostError(
                    f"the device failed: {error} What is done is kept; run again to go on, or say "
                    "that the CPU is to take its place (on_gpu_error='cpu')."
                ) from error
            warn(f"the device failed: {error} The CPU goes on in its place.")
        self._finder = self._local("cpu")
        yield from self.find(volumes[done:])

    @property
    def is_host(self) -> bool:
        """Whether this very process computes, on its processor."""
        return isinstance(self._finder, Finder) and self._finder.batch_bytes == 1


def make_tools(job: Job, device: Connection | None = None) -> Tools:
    """Return the tools of a process, which has one thread of BLAS and its memory to itself.

    Raises
    ------
    RuntimeError
        If another version of gpuroi is installed here than where the run was started.
    """
    from gpuroi import __version__

    if job.version != __version__:
        raise RuntimeError(
            f"gpuroi {job.version} has started the run, and a worker has gpuroi {__version__}; "
            "install the same everywhere."
        )
    threadpool_limits(1)  # of what is loaded; of what will be:
    os.environ.update(dict.fromkeys(_BLAS_THREADS, "1"))
    _keep_freed_memory()
    return Tools(job, device)


@dataclass
class _Opened:
    """A map on its way: what has been read, found, and gone wrong."""

    one: MapFile
    identity: tuple[int, int]
    volumes: list[Prepared] = field(default_factory=list)
    found: list[tuple[Found, ComputedBy]] = field(default_factory=list)
    error: Exception | None = None
    warnings: list[str] = field(default_factory=list)


def extract(tools: Tools, unit: tuple[MapFile, ...]) -> list[Record]:
    """Write the regions of the maps of `unit`, and return what became of each.

    A device is given them together; a processor one by one, as long as they are in its cache.
    """
    return [record for maps in _together(tools, unit) for record in _extract(tools, maps)]


def _together(tools: Tools, unit: tuple[MapFile, ...]) -> Iterator[tuple[MapFile, ...]]:
    """Yield the maps of `unit` as many at once as are to be held in memory."""
    maps: list[MapFile] = []
    held = 0
    for one in unit:
        n_bytes = identify(one.path)[0]
        if maps and (tools.is_host or held + n_bytes > _MOST_FILE_BYTES):
            yield tuple(maps)
            maps, held = [], 0
        maps.append(one)
        held += n_bytes
    yield tuple(maps)


def _extract(tools: Tools, unit: tuple[MapFile, ...]) -> list[Record]:
    opened = [_open(one) for one in unit]
    sound = [one for one in opened if one.error is None]
    try:
        _find(tools, sound)
    except DeviceLostError:
        raise
    except Exception:  # whose?
        for one in sound:
            try:
                _find(tools, [one])
            except DeviceLostError:
                raise
            except Exception as error:
                one.error = error
    return [_write(tools, one) for one in opened]


def _open(one: MapFile) -> _Opened:
    """Read and prepare all volumes of a map."""
    opened = _Opened(one, identify(one.path))
    with _caught(opened):
        opened.volumes = [prepare(volume) for volume in io.read_maps(one.path)]
        if identify(one.path) != opened.identity:
            raise InvalidMapError(f"{one.path} was changed while it was read.")
    return opened


def _find(tools: Tools, opened: list[_Opened]) -> None:
    """Find the regions of several maps together: a device likes large batches."""
    with collected_warnings() as warnings:
        found = tools.find([volume for one in opened for volume in one.volumes])
        for one in opened:
            one.found = list(islice(found, len(one.volumes)))
    if opened:
        opened[0].warnings += warnings


def _write(tools: Tools, opened: _Opened) -> Record:
    """Write the files of a map, all or none, and return its record."""
    job, written, n_regions = tools.job, Written(tools.job.folder), 0
    names = output_names(opened.one.stem, len(opened.volumes))
    if opened.error is None:
        with _caught(opened):
            for name, volume, found in zip(names, opened.volumes, opened.found, strict=True):
                regions = finish(volume, found[0], job.recipe, tools.described, found[1])
                _refuse_if_over(job)
                written.add(name, regions)
                n_regions += len(regions)
    if opened.error is not None:
        _refuse_if_over(job)
        written.undo()
        return failed(opened.one, job.parameters, opened.error, opened.identity, opened.warnings)
    return Record(
        opened.one.source,
        *opened.identity,
        job.parameters,
        opened.one.stem,
        "done",
        n_volumes=len(opened.volumes),
        n_regions=n_regions,
        output_bytes=written.n_bytes,
        output_crc=written.crc,
        warnings=tuple(opened.warnings),
    )


def _refuse_if_over(job: Job) -> None:
    """Raise `FolderInUseError` if the next run has begun: workers of Dask may outlive their own."""
    path, run = job.run
    if path.read_text() != run:
        raise FolderInUseError(f"{job.folder} is in use by another run, which has begun since.")


def failed(
    one: MapFile,
    parameters: str,
    error: BaseException,
    identity: tuple[int, int] | None = None,
    warnings: Sequence[str] = (),
) -> Record:
    """Return the record of a map that could not be done."""
    return Record(
        one.source,
        *(identity or identify(one.path)),
        parameters,
        one.stem,
        "failed",
        error=type(error).__name__,
        message=str(error),
        warnings=tuple(warnings),
    )


def check(tools: Tools, unit: tuple[Record, ...]) -> list[bool]:
    """Return of each map whether its files are as they were written."""
    return [is_whole(tools.job.folder, record) for record in unit]


@dataclass(frozen=True)
class Sum:
    """What holds of some maps together."""

    header: str  # of their tables
    rows: list[str]
    overlap: Overlap


def sum_up(tools: Tools, unit: tuple[tuple[Record, ...], ...]) -> list[Sum]:
    """Return the rows of all tables, each after the name of its map, and the overlap."""
    return [sum_of(tools.job.folder, records) for records in unit]


def sum_of(folder: Path, records: tuple[Record, ...]) -> Sum:
    """Return what holds of the maps of `records` together.

    Raises
    ------
    OutputChangedError
        If one of their files is not as it was written.
    """
    header, rows, overlap = "", [], Overlap()
    for record in records:
        if not is_whole(folder, record):
            raise OutputChangedError(
                f"an output of {record.source} is gone, or not as it was written; run again, all "
                "shards if there are any."
            )
        for name in output_names(record.stem, record.n_volumes):
            header, *table = (folder / f"{name}.tsv").read_text("utf-8").splitlines()
            (labels,) = io.read_maps(folder / f"{name}.nii.gz")
            rows += [f"{cell(map_name(name))}\t{row}" for row in table]
            overlap.add(labels.data != 0, labels.affine, labels.header)
    return Sum(header, rows, overlap)


def identify(path: str) -> tuple[int, int]:
    """Return a file's size and time of change in ns, -1 both if it is not there.

    Of a .hdr or .img, both files' together.
    """
    if match := _PAIR.search(path):
        sizes, times = zip(
            *(_identify(path[: match.start()] + kind + match[2]) for kind in (".hdr", ".img")),
            strict=True,
        )
        return (-1, -1) if min(sizes) < 0 else (sum(sizes), max(times))
    return _identify(path)


def _identify(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)  # noqa: PTH116  # not worth a Path a map
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def _caught(opened: _Opened) -> Iterator[None]:
    """Keep the warnings of the block, and the error that ends it."""
    with collected_warnings() as warnings:
        try:
            yield
        except Exception as error:  # whatever is wrong with a map is a record, not the end
            opened.error = error
    opened.warnings += warnings


def _keep_freed_memory() -> None:
    """Let malloc of glibc keep what is freed for the next map, as much as a map may need.

    Otherwise each array is fetched from the system page by page: a quarter of the time of a small
    map, and more under Dask, which tells malloc to give everything back at once.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        # In this order: either switches off what malloc finds out by itself.
        if mallopt(_M_MMAP_THRESHOLD, _MOST_MMAP_THRESHOLD):
            mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)

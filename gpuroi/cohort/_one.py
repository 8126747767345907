"""What is done with one map: read, extract, write; every failure becomes a record."""

import contextlib
import ctypes
import stat
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from gpuroi import io
from gpuroi.backends import Backend, get_backend
from gpuroi.cohort._discover import MapFile
from gpuroi.cohort._ledger import Record
from gpuroi.errors import InvalidMapError
from gpuroi.pipeline import extract_maps
from gpuroi.recipe import Recipe

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Outcome:
    """The record of a map, and what it warned of."""

    record: Record
    warnings: tuple[str, ...] = ()


def make_work(
    folder: Path, recipe: Recipe, parameters: str, backend: str
) -> Callable[[MapFile], Outcome]:
    """Return the work of a process, which has one thread of BLAS and its memory to itself."""
    threadpool_limits(1)
    _keep_freed_memory()
    chosen = get_backend(backend)
    return lambda one: extract_one(one, folder, recipe, parameters, chosen)


def extract_one(
    one: MapFile, folder: Path, recipe: Recipe, parameters: str, backend: Backend
) -> Outcome:
    """Write the regions of every volume of a map below `folder`, and return what became of it."""
    identity = identify(one.path)
    outputs: dict[str, tuple[int, int]] = {}
    n_regions = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            if not stat.S_ISREG(one.path.stat().st_mode):
                raise InvalidMapError(f"{one.path} is not a regular file.")
            volumes = io.read_maps(one.path)
            if identify(one.path) != identity:
                raise InvalidMapError(f"{one.path} was changed while it was read.")
            for number, regions in enumerate(extract_maps(volumes, recipe, backend)):
                volume = f"_vol-{number:04d}" if len(volumes) > 1 else ""
                for extension, content in regions.files().values():
                    name = f"{one.stem}{volume}_desc-regions_dseg{extension}"
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    # The ledger tells what a power cut has emptied: no need to wait for the disk.
                    io.write_bytes(content, folder / name, sync=False)
                    outputs[name] = (len(content), zlib.crc32(content))
                n_regions += len(regions)
        except Exception as error:  # whatever is wrong with a map is a record, not the end
            return Outcome(failed(one, parameters, error, identity), _messages(caught))
    record = Record(
        str(one.path.absolute()), *identity, parameters, str(one.stem), "done", outputs, n_regions
    )
    return Outcome(record, _messages(caught))


def failed(
    one: MapFile, parameters: str, error: BaseException, identity: tuple[int, int] | None = None
) -> Record:
    """Return the record of a map that could not be done."""
    return Record(
        str(one.path.absolute()),
        *(identity or identify(one.path)),
        parameters,
        str(one.stem),
        "failed",
        error=type(error).__name__,
        message=str(error),
    )


def _keep_freed_memory() -> None:
    """Let malloc of glibc keep what is freed for the next map, as much as a map may need.

    Otherwise each array is fetched from the system page by page: a quarter of the time of a small
    map, and more under Dask, which tells malloc to give everything back at once.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)


def identify(path: Path) -> tuple[int, int]:
    """Return a file's size and time of change in ns, -1 both if it is not there."""
    try:
        found = path.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _messages(caught: Any) -> tuple[str, ...]:
    return tuple(str(warning.message) for warning in caught)

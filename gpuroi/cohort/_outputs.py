"""The files of a map: their names, and whether they are as they were written."""

import contextlib
import re
import zlib
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

from gpuroi import io
from gpuroi.cohort._ledger import Record, disk_errors
from gpuroi.result import ENDING, EXTENSIONS, Regions

_EXTENSIONS = tuple(EXTENSIONS.values())
_ANY_EXTENSION = "|".join(map(re.escape, _EXTENSIONS))
_BREAKS = re.compile(r"\s*[\t\r\n]\s*")
_WITHOUT_EXTENSION = re.compile(rf"({_ANY_EXTENSION})$")
_VOLUME = re.compile(r"_vol-\d{4,}$")
_NAME = re.compile(rf"(?P<stem>.+?)(_vol-\d{{4,}})?{ENDING}({_ANY_EXTENSION})", re.DOTALL)

# The clock that files are stamped with ticks slowly, and may be another machine's.
_CLOCKS_DIFFER_NS = 10**9


def output_names(stem: str, n_volumes: int) -> Iterator[str]:
    """Yield what comes before the extensions, volume by volume, below the output folder."""
    for number in range(n_volumes):
        volume = f"_vol-{number:04d}" if n_volumes > 1 else ""
        yield f"{stem}{volume}{ENDING}"


def series_of(stem: str) -> str:
    """Return the stem of the series of which `stem` may be a volume; that of others as it is."""
    return _VOLUME.sub("", stem)


def stems_of_output(name: str) -> tuple[str, ...]:
    """Return the stems that the map may have of which the file `name` is an output; none of others.

    ``a_vol-0001`` may be a volume of ``a``, or a map of that name.
    """
    match = _NAME.fullmatch(name)
    return (match["stem"], match["stem"] + (match[2] or "")) if match else ()


def map_name(name: str) -> str:
    """Return how a cohort's table calls the map whose outputs are called `name`."""
    return name.removesuffix(ENDING)


def one_line(text: str) -> str:
    """Return `text` for a cell of a table: without tabs and ends of lines."""
    return _BREAKS.sub(" ", text)


def cell(text: str) -> str:
    """Return `text` as it stands in a table: on one line, quoted if it has quotes."""
    line = one_line(text)
    return '"' + line.replace('"', '""') + '"' if '"' in line else line


class Written:
    """Writes the files of a map, and sums them up."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths: list[Path] = []
        self.n_bytes = 0
        self.crc = 0

    def add(self, name: str, regions: Regions) -> None:
        """Write the files of one volume, each whole or not at all.

        Raises
        ------
        OutputError
            If the disk is full or read-only.
        OSError
            If one of the files cannot be written.
        """
        contents = dict(regions.files().values())
        for extension in _EXTENSIONS:
            path = self._folder / f"{name}{extension}"
            with disk_errors(self._folder):
                _write(contents[extension], path)
            self._paths.append(path)
            self.take(contents[extension])

    def undo(self) -> None:
        """Remove the files: a map has all of them, or none."""
        for path in self._paths:
            path.unlink(missing_ok=True)

    def take(self, content: bytes) -> None:
        """Sum up one file more."""
        self.n_bytes += len(content)
        self.crc = zlib.crc32(content, self.crc)


def _write(content: bytes, path: Path) -> None:
    # The ledger tells what a power cut has emptied: no need to wait for the disk.
    try:
        io.write_bytes(content, path, sync=False)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        io.write_bytes(content, path, sync=False)


def stems_of_name(name: str) -> tuple[str, ...]:
    """Return the stems that the map may have whose outputs are called `name`, extensions left out.

    See `stems_of_output`.
    """
    below, slash, inside = name.rpartition("/")
    return tuple(below + slash + stem for stem in stems_of_output(f"{inside}{_EXTENSIONS[0]}"))


def remove_outputs(folder: Path, names: Iterable[str], since_ns: int = 0) -> None:
    """Remove the files of volumes whose outputs are called `names`, if written since then."""
    for name in names:
        for extension in _EXTENSIONS:
            path = folder / f"{name}{extension}"
            # What cannot be removed is found in the way when it is to be written.
            with contextlib.suppress(OSError):
                if path.lstat().st_mtime_ns >= since_ns - _CLOCKS_DIFFER_NS:
                    path.unlink()


def written_names(folder: Path, stems: Set[str]) -> set[str]:
    """Return how the outputs are called that are there of maps, however many volumes they have.

    A volume ``a_vol-0001`` of ``a`` counts for both stems.
    """
    names = set()
    for below, inside in _by_folder(stems).items():
        for found in _listing(folder / below):
            if not inside.isdisjoint(stems_of_output(found)):
                names.add(f"{below}/{found}".removeprefix("/"))
    return {_WITHOUT_EXTENSION.sub("", name) for name in names}


def remove_temporaries(folder: Path, stems: Set[str]) -> None:
    """Remove what processes that were killed have left of these maps: other shards have theirs."""
    for below, names in _by_folder(stems).items():
        for found in _listing(folder / below):
            match = io.TEMPORARY.fullmatch(found)
            if match and not names.isdisjoint(stems_of_output(match["name"])):
                (folder / below / found).unlink(missing_ok=True)


def _by_folder(stems: Set[str]) -> dict[str, set[str]]:
    """Return the names of `stems` by the folders that they are in."""
    names: dict[str, set[str]] = {}
    for stem in stems:
        below, _, name = stem.rpartition("/")
        names.setdefault(below, set()).add(name)
    return names


def _listing(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def is_whole(folder: Path, record: Record) -> bool:
    """Return whether all files of a map are there as they were written."""
    found = Written(folder)
    try:
        for name in output_names(record.stem, record.n_volumes):
            for extension in _EXTENSIONS:
                found.take((folder / f"{name}{extension}").read_bytes())
    except OSError:
        return False
    return (found.n_bytes, found.crc) == (record.output_bytes, record.output_crc)

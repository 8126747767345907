"""The files of a map: their names, and whether they are as they were written."""

import glob
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from gpuroi import io
from gpuroi.cohort._ledger import Record, disk_errors
from gpuroi.result import Regions

EXTENSIONS = (".nii.gz", ".tsv", ".json")
_ENDING = "_desc-regions_dseg"
_ANY_EXTENSION = "|".join(map(re.escape, EXTENSIONS))
_NAME = re.compile(rf"(?P<stem>.+?)(_vol-\d{{4,}})?{_ENDING}({_ANY_EXTENSION})", re.DOTALL)


def output_names(stem: str, n_volumes: int) -> Iterator[str]:
    """Yield what comes before the extensions, volume by volume, below the output folder."""
    for number in range(n_volumes):
        volume = f"_vol-{number:04d}" if n_volumes > 1 else ""
        yield f"{stem}{volume}{_ENDING}"


def stems_of_output(name: str) -> tuple[str, ...]:
    """Return the stems that the map may have of which the file `name` is an output; none of others.

    ``a_vol-0001`` may be a volume of ``a``, or a map of that name.
    """
    match = _NAME.fullmatch(name)
    return (match["stem"], match["stem"] + (match[2] or "")) if match else ()


def map_name(name: str) -> str:
    """Return how a cohort's table calls the map whose outputs are called `name`."""
    return name.removesuffix(_ENDING)


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
        for extension in EXTENSIONS:
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


def remove_outputs(folder: Path, names: Iterable[str]) -> None:
    """Remove the files of volumes whose outputs are called `names`."""
    for name in names:
        for extension in EXTENSIONS:
            (folder / f"{name}{extension}").unlink(missing_ok=True)


def written_names(folder: Path, stem: str) -> set[str]:
    """Return how the outputs are called that are there of a map, however many of its volumes."""
    below, _, name = stem.rpartition("/")
    of_stem = re.compile(
        rf"{re.escape(name)}(_vol-\d{{4,}})?{_ENDING}(?P<extension>{_ANY_EXTENSION})"
    )
    found = (folder / below).glob(f"{glob.escape(name)}*{_ENDING}.*")
    prefix = f"{below}/" if below else ""
    matches = (of_stem.fullmatch(path.name) for path in found)
    return {prefix + match.string[: match.start("extension")] for match in matches if match}


def is_whole(folder: Path, record: Record) -> bool:
    """Return whether all files of a map are there as they were written."""
    found = Written(folder)
    try:
        for name in output_names(record.stem, record.n_volumes):
            for extension in EXTENSIONS:
                found.take((folder / f"{name}{extension}").read_bytes())
    except OSError:
        return False
    return (found.n_bytes, found.crc) == (record.output_bytes, record.output_crc)

"""What must not be replaced: maps, files of others, and results of other maps."""

import os
from collections.abc import Iterable, Iterator, Mapping, Set
from functools import cache
from itertools import chain
from pathlib import Path

from gpuroi.cohort._discover import (
    DESCRIPTION,
    PAGE_FOLDER,
    SUMMARIES,
    MapFile,
    common_folder,
)
from gpuroi.cohort._ledger import LEDGER_FOLDER, Ledger, Record
from gpuroi.cohort._outputs import output_names, series_of, stems_of_output
from gpuroi.result import ENDING


def refuse_to_replace(folder: Path, maps: list[MapFile], masks: Iterable[str] = ()) -> None:
    """Raise `ValueError` if an output would take the place of a map, a mask, or a file of others.

    Files are told by where they really are, whatever links lead there.
    """
    real = cache(os.path.realpath)  # of folders, which hold many maps each
    written: dict[str, set[str]] = {}
    for one in maps:
        below, _, name = one.stem.rpartition("/")
        written.setdefault(real(os.path.join(folder, below)), set()).add(name)
    for path in chain((one.source for one in maps), masks):
        parent, name = os.path.split(path)
        place = os.path.join(real(parent), name)
        if os.path.islink(place):
            place = os.path.realpath(place)
        parent, name = os.path.split(place)
        is_summary = name in SUMMARIES and parent == real(str(folder))
        if is_summary or not written.get(parent, set()).isdisjoint(stems_of_output(name)):
            raise ValueError(f"{path} would be replaced by an output; write to another folder.")
    if not (folder / LEDGER_FOLDER).is_dir():
        for name in (*SUMMARIES, PAGE_FOLDER):
            if name != DESCRIPTION and os.path.lexists(folder / name):
                raise ValueError(
                    f"{folder / name} is there already, and not of gpuroi, which has no "
                    f"{LEDGER_FOLDER} there; move it away, or write to another folder."
                )


def refuse_to_forget(folder: Path, maps: list[MapFile], named: Set[str], ledger: Ledger) -> None:
    """Raise `ValueError` if results of a map that is still there would be replaced by another's.

    `named` are the paths of all maps of this call, of which `maps` are to be worked on.
    """
    volumes: dict[str, list[Record]] = {}
    for stem, owner in ledger.owners.items():
        if series_of(stem) != stem:
            volumes.setdefault(series_of(stem), []).append(owner)
    for one in maps:
        for rival in _rivals(one, ledger.owners, volumes):
            if (
                rival.source not in named
                and _may_be_there(rival.source)
                and not _is_same_file(rival.source, one.source)
                and _has_outputs(folder, rival)
            ):
                above = common_folder([*map(os.path.dirname, (rival.source, one.source))])
                place = "" if above is None else f" ({above})"
                raise ValueError(
                    f"{folder} has the regions of {rival.source}, which those of {one.source} may "
                    f"replace: {rival.stem} and {one.stem} may be called the same. Name the folder "
                    f"that holds both{place}, remove the regions of the first, or write to another "
                    "folder."
                )


def _rivals(
    one: MapFile, owners: Mapping[str, Record], volumes: Mapping[str, list[Record]]
) -> Iterator[Record]:
    """Yield whose results may be called like those of `one`, or like a volume of it."""
    if one.stem in owners:
        yield owners[one.stem]
    yield from volumes.get(one.stem, [])
    series = owners.get(series_of(one.stem))
    if series and series.stem != one.stem:
        names = output_names(series.stem, series.n_volumes)
        if f"{one.stem}{ENDING}" in names:
            yield series


def _may_be_there(path: str) -> bool:
    """Return whether there is a file, or a link to what is not fetched; also if nobody can tell."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _is_same_file(path: str, other: str) -> bool:
    try:
        return Path(path).samefile(other)
    except OSError:
        return False


def _has_outputs(folder: Path, record: Record) -> bool:
    names = output_names(record.stem, record.n_volumes)
    return any((folder / f"{name}.nii.gz").exists() for name in names)

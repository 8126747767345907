"""From what the user names to the files to work on, and what their outputs are called."""

import glob
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpuroi.cohort._ledger import LEDGER_FOLDER
from gpuroi.cohort._outputs import series_of, stems_of_output
from gpuroi.errors import MissingExtraError, warn
from gpuroi.result import ENDING

_EXTENSION = re.compile(r"(\.(nii|img|hdr)(\.gz|\.bz2)?|\.mg[hz])$", re.IGNORECASE)
_IN_FOLDERS = (".nii", ".nii.gz")
_NAMES_IGNORE_CASE = sys.platform in ("win32", "darwin")

#: A folder with this file is a BIDS dataset.
DESCRIPTION = "dataset_description.json"

#: Of a whole cohort: tables, overlap, failures, and the page with what lies beside it.
TABLE, OVERLAP, FAILURES = "regions.tsv", "overlap.nii.gz", "failures.tsv"
PAGE, PAGE_FOLDER = "report.html", "report_data"
SUMMARIES = (TABLE, OVERLAP, FAILURES, DESCRIPTION, PAGE)

#: Suffixes of BIDS derivatives that are statistical maps.
MAP_SUFFIXES = ("statmap", "tmap", "zmap", "effect", "stat")


@dataclass(frozen=True, slots=True)
class MapFile:
    """A file to work on.

    Attributes
    ----------
    path : str
        As it was named.
    source : str
        Absolute path.
    stem : str
        What the names of its outputs begin with, below the output folder; with slashes everywhere.
    """

    path: str
    source: str
    stem: str


def find_maps(
    inputs: Iterable[str | os.PathLike[str]],
    *,
    entities: Mapping[str, str | Sequence[str]] | None = None,
    shard: tuple[int, int] | None = None,
    limit: int | None = None,
) -> list[MapFile]:
    """Return the maps that `inputs` name, each once.

    Parameters
    ----------
    inputs : paths
        Files; folders, with all NIfTI files below them; patterns such as ``"sub-*/*_tmap.nii.gz"``;
        lists, ``"@maps.txt"`` with a path a line. A folder with a ``dataset_description.json`` is a
        BIDS dataset, of which the statistical maps are taken: files that end in ``_statmap``,
        ``_tmap``, ``_zmap``, ``_effect`` or ``_stat``. Maps found in a folder keep the folders
        below it in their stems; the others do if two are called the same, below the folder that
        they all are in.
    entities : mapping, optional
        Values that a BIDS entity may have, such as ``{"sub": ["01", "02"], "contrast": "go"}``;
        files without the entity are left out. Names are parsed by nilearn.
    shard : (i, n), optional
        Take every n-th map from the i-th on, i from 1 to n: for the tasks of a scheduler's array.
    limit : int, optional
        Take the first so many; of a shard, of its own.

    Returns
    -------
    list of MapFile
        In the order of `inputs`, folders in that of their names.

    Raises
    ------
    ValueError
        If nothing is found, a folder does not exist, or two maps would write to the same place.
    TypeError
        If `shard` is no pair of integers, or a label no string.
    MissingExtraError
        If BIDS entities are to be read, and nilearn is not installed.

    Examples
    --------
    >>> from gpuroi.cohort import find_maps
    >>> [one.stem for one in find_maps(["maps/sub-01_tmap.nii.gz"])]
    ['sub-01_tmap']
    """
    part_of([], shard=shard, limit=limit)  # what does not exist is told before files are looked for
    wanted = _wanted(entities or {})
    has_entities = _entity_filter(wanted)
    found: dict[str, MapFile] = {}
    in_folders: set[str] = set()
    for source in map(_as_path, inputs):
        named = list(_named_by(source))
        for one, is_in_folder in named:
            if has_entities(one.source):
                if is_in_folder and one.source not in found:
                    in_folders.add(one.source)
                found.setdefault(one.source, one)
        if not named:
            raise ValueError(
                f"{source}: there is no map here; name NIfTI files, folders or BIDS "
                f"datasets that hold them, patterns, or a list as @maps.txt."
            )
    if not found and not wanted:
        raise ValueError("there is no input; name files, folders, patterns or lists of maps.")
    if not found:
        asked = ", ".join(f"{key}-{'|'.join(values)}" for key, values in wanted.items())
        raise ValueError(f"no map has {asked} in its name.")
    _warn_of_missing(wanted, found)
    maps = _told_apart(list(found.values()), in_folders)
    _refuse_collisions(maps)
    return part_of(maps, shard=shard, limit=limit)


def refuse_if_all_are_missing(maps: Sequence[MapFile]) -> None:
    """Raise `ValueError` if none of `maps` is there: a name is wrong, or a disk is not mounted."""
    if any(os.path.lexists(one.path) for one in maps):
        return
    if len(maps) == 1:
        raise ValueError(f"{maps[0].path}: there is no such file.")
    raise ValueError(
        f"none of {len(maps):,} maps is there, neither {maps[0].path} nor the others; is a disk "
        "missing?"
    )


def part_of(
    maps: list[MapFile], *, shard: tuple[int, int] | None, limit: int | None
) -> list[MapFile]:
    """Return the maps of a shard, no more than `limit`; see `find_maps`."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit!r} leaves nothing to do; pass a number of maps >= 1.")
    first, step = (0, 1) if shard is None else (_first_of_shard(shard), shard[1])
    return maps[first::step][:limit]


def _first_of_shard(shard: tuple[int, int]) -> int:
    if isinstance(shard, str) or [type(part) for part in shard] != [int, int]:
        raise TypeError(f"shard={shard!r} is not a pair of integers; pass (3, 16) for 3/16.")
    number, n_shards = shard
    if not 1 <= number <= n_shards:
        raise ValueError(
            f"shard {number}/{n_shards} does not exist; pass 1/{max(1, n_shards)} and on."
        )
    return number - 1


def _as_path(source: Any) -> str:
    try:
        path: str = os.fspath(source)
    except TypeError:
        raise TypeError(
            f"inputs: a {type(source).__name__} is no path; images in memory are extract_regions'."
        ) from None
    return path


def _named_by(source: str) -> Iterator[tuple[MapFile, bool]]:
    """Yield the maps that `source` names, and whether they were found in a folder."""
    if source.startswith("@"):
        yield from _listed(source[1:])
        return
    path = os.path.expanduser(source)
    if os.path.isdir(path) and not source.lower().endswith(_IN_FOLDERS):
        yield from ((one, True) for one in _in_folder(path))
    elif glob.has_magic(source) and not os.path.exists(path):
        for match in sorted(glob.glob(path, recursive=True)):
            if not _is_output(*os.path.split(match)):
                yield from _named_by(match)
    elif os.path.exists(path) or _EXTENSION.search(path):
        yield _one_file(path), False  # if it is missing, this is found when its turn comes
    else:
        raise ValueError(f"{source}: there is no such file or folder.")


def _one_file(path: str) -> MapFile:
    source = os.path.abspath(path)
    return MapFile(path, source, stem_of(source))


def _told_apart(maps: list[MapFile], in_folders: Set[str]) -> list[MapFile]:
    """Return `maps` with stems that tell apart those that were not found `in_folders`.

    In the layouts of SPM and FSL, the folder alone says whose ``spmT_0001.nii`` it is.
    """
    named = [one for one in maps if one.source not in in_folders]
    if len({one.stem for one in named}) == len(named):
        return maps
    first_of: dict[tuple[str, str], MapFile] = {}
    for one in named:
        first_of.setdefault((one.stem, os.path.realpath(one.source)), one)
    again = set(named) - set(first_of.values())  # by another way to the same file
    maps = [one for one in maps if one not in again]
    if len({stem for stem, _ in first_of}) == len(first_of):
        return maps
    top = common_folder([os.path.dirname(one.source) for one in first_of.values()])
    if top is None:  # on several drives
        return maps
    named_once = set(first_of.values())
    return [_below(top, one) if one in named_once else one for one in maps]


def _below(top: str, one: MapFile) -> MapFile:
    """Return `one` with the folders below `top` in its stem."""
    inside = os.path.relpath(os.path.dirname(one.source), top).replace(os.sep, "/")
    return one if inside == "." else replace(one, stem=f"{inside}/{one.stem}")


def _listed(path: str) -> Iterator[tuple[MapFile, bool]]:
    try:
        content = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ValueError(f"the list {path} cannot be read: {error.strerror}.") from error
    # File names may have any bytes, and what else Python takes for the end of a line.
    for line in content.decode("utf-8-sig", "surrogateescape").split("\n"):
        entry = line.strip(" \t\r")
        if entry.startswith("@"):
            raise ValueError(f"{path}: {entry} is a list in a list; name its maps, or both lists.")
        if entry and not entry.startswith("#"):
            # Among many lines, one that names nothing is a map that fails, whatever it looks like.
            named = os.path.expanduser(entry)
            is_something = os.path.exists(named) or glob.has_magic(entry)
            found = list(_named_by(entry)) if is_something else []
            yield from found or [(_one_file(named), False)]


def _in_folder(folder: str) -> Iterator[MapFile]:
    """Yield the maps of a folder, of a BIDS dataset the statistical ones, hidden files left out.

    Links to folders are followed, each folder once. Results of gpuroi are no maps.
    """
    parse = _bids_parser() if is_dataset(folder) else None
    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(parent, folder).replace(os.sep, "/")
        # A folder may be called like a file: it is a failure to tell, not a place to look in.
        for name in sorted(
            [*names, *(name for name in folders if name.lower().endswith(_IN_FOLDERS))]
        ):
            if name.startswith(".") or not name.lower().endswith(_IN_FOLDERS):
                continue
            if _is_output(parent, name):
                continue
            if parse is None or parse(name)["suffix"] in MAP_SUFFIXES:
                path = os.path.join(parent, name)
                stem = stem_of(name) if inside == "." else f"{inside}/{stem_of(name)}"
                yield MapFile(path, os.path.abspath(path), stem)
        folders[:] = [name for name in folders if not name.lower().endswith(_IN_FOLDERS)]


def _refuse(error: OSError) -> None:
    raise ValueError(
        f"{error.filename} cannot be looked into ({error.strerror}); what maps are there? Name the "
        "folders beside it, or make it readable."
    ) from error


def _is_output(folder: str, name: str) -> bool:
    """Return whether a file is an output of gpuroi."""
    return bool(stems_of_output(name)) or (
        name in SUMMARIES and os.path.isdir(os.path.join(folder, LEDGER_FOLDER))
    )


def common_folder(folders: Sequence[str]) -> str | None:
    """Return the folder that all `folders` are in; None if they are on several drives."""
    try:
        return os.path.commonpath(folders)
    except ValueError:
        return None


def is_dataset(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder is a BIDS dataset that somebody else than gpuroi has described."""
    if not os.path.lexists(os.path.join(folder, DESCRIPTION)):
        return False
    try:
        described = json.loads(Path(folder, DESCRIPTION).read_text("utf-8"))
        makers = [maker["Name"] for maker in described.get("GeneratedBy", [])]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return True  # badly described, or not to be read
    return makers != ["gpuroi"]


def stem_of(path: str | os.PathLike[str]) -> str:
    """Return the name of a map without its extensions, which the names of its outputs begin with.

    Examples
    --------
    >>> stem_of("maps/sub-01_tmap.nii.gz")
    'sub-01_tmap'
    """
    return _EXTENSION.sub("", os.path.basename(path))


def _wanted(entities: Mapping[str, str | Sequence[str]]) -> dict[str, list[str]]:
    """Return the labels wanted of each entity, ``01`` for ``sub-01`` too."""
    as_lists = {
        key: [values] if isinstance(values, str) else list(values)
        for key, values in entities.items()
    }
    for key, values in as_lists.items():
        for value in values:
            if not isinstance(value, str):
                raise TypeError(
                    f"entities: {key}={value!r} is a {type(value).__name__}; pass labels as they "
                    "are in file names, such as '01'."
                )
    return {
        key: [value.removeprefix(f"{key}-") for value in values]
        for key, values in as_lists.items()
        if values
    }


def _entity_filter(wanted: Mapping[str, Sequence[str]]) -> Callable[[str], bool]:
    """Return what says of a path whether it has one of the labels `wanted` of each entity."""
    if not wanted:
        return lambda path: True
    parse = _bids_parser()

    def has_entities(path: str) -> bool:
        name = os.path.basename(path)
        has = parse(name)["entities"] if "." in name else {}
        return all(has.get(key) in labels for key, labels in wanted.items())

    return has_entities


def _warn_of_missing(wanted: Mapping[str, Sequence[str]], found: Iterable[str]) -> None:
    """Warn of labels that no map has: some may have been mistyped."""
    if not wanted:
        return
    parse = _bids_parser()
    has = [parse(os.path.basename(path))["entities"] for path in found]
    for key, labels in wanted.items():
        missing = set(labels) - {entities[key] for entities in has}
        if missing:
            named = ", ".join(f"{key}-{label}" for label in sorted(missing))
            warn(f"of all maps that are asked for, none has {named} in its name.")


def _bids_parser() -> Callable[[str], Any]:
    try:
        from nilearn.interfaces.bids import parse_bids_filename
    except ImportError as error:
        raise MissingExtraError(
            f"BIDS names are read by nilearn, which cannot be imported ({error}); "
            "pip install 'gpuroi[bids]', or name the files by a pattern."
        ) from error
    parse: Callable[[str], Any] = parse_bids_filename
    return parse


def _refuse_collisions(maps: list[MapFile]) -> None:
    """Raise `ValueError` if two maps, or volumes of them, could be written to one place."""
    by_stem: dict[str, str] = {}
    for one in maps:
        if not one.stem.rpartition("/")[2]:
            raise ValueError(f"{one.path} has no name that its outputs could be called after.")
        stem = one.stem.casefold() if _NAMES_IGNORE_CASE else one.stem
        if stem in by_stem:
            folders = [os.path.dirname(path) for path in (by_stem[stem], one.path)]
            hint = "leave one of them out, or "
            if folders[0] != folders[1]:
                above = common_folder(folders)
                hint = f"name {above}, which holds both, or " if above else ""
            raise ValueError(
                f"{by_stem[stem]} and {one.path} would both write "
                f"{one.stem}{ENDING}.nii.gz; {hint}extract them into separate folders."
            )
        by_stem[stem] = one.path
    for stem, path in by_stem.items():
        series = series_of(stem)
        if series != stem and series in by_stem:
            raise ValueError(
                f"a volume of {by_stem[series]} could be written as "
                f"{stem}{ENDING}.nii.gz, as {path} is; extract them into separate "
                "folders."
            )

"""From what the user names to the files to work on, and what their outputs are called."""

import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_EXTENSION = re.compile(r"(\.nii|\.mgh|\.mgz|\.img|\.hdr)?(\.gz|\.bz2)?$", re.IGNORECASE)
_IN_FOLDERS = (".nii", ".nii.gz")

#: Suffixes of BIDS derivatives that are statistical maps.
_MAP_SUFFIXES = ("statmap", "tmap", "zmap", "effect", "stat")


@dataclass(frozen=True)
class MapFile:
    """A file to work on, and what the names of its outputs begin with, below the output folder."""

    path: Path
    stem: PurePosixPath


def find_maps(
    inputs: Iterable[str | os.PathLike[str]],
    *,
    entities: Mapping[str, Sequence[str]] | None = None,
    shard: tuple[int, int] | None = None,
    limit: int | None = None,
) -> list[MapFile]:
    """Return the maps that `inputs` name, each once.

    Parameters
    ----------
    inputs : paths
        Files; folders, with all NIfTI files below them; patterns such as ``"sub-*/*_tmap.nii.gz"``;
        lists, ``"@maps.txt"`` with a path a line. A folder with a ``dataset_description.json`` is a
        BIDS dataset, of which the statistical maps are taken.
    entities : mapping, optional
        Values that a BIDS entity may have, such as ``{"sub": ["01", "02"], "contrast": ["go"]}``;
        files without the entity are left out.
    shard : (i, n), optional
        Take every n-th map from the i-th on, i from 1 to n: for the tasks of a scheduler's array.
    limit : int, optional
        Take the first so many.

    Raises
    ------
    ValueError
        If nothing is found, or two maps would write to the same place.

    Examples
    --------
    >>> from gpuroi.cohort import find_maps
    >>> [str(one.stem) for one in find_maps(["maps/sub-01_tmap.nii.gz"])]
    ['sub-01_tmap']
    """
    found: dict[Path, MapFile] = {}
    for source in inputs:
        n_before = len(found)
        for one in _named_by(os.fspath(source)):
            if _has_entities(one.path.name, entities or {}):
                found.setdefault(one.path.absolute(), one)
        if len(found) == n_before and not any(_named_by(os.fspath(source))):
            raise ValueError(f"{os.fspath(source)}: there is no map here.")
    if not found:
        wanted = ", ".join(f"{key}-{'|'.join(values)}" for key, values in (entities or {}).items())
        raise ValueError(f"no map has {wanted or 'a name that was asked for'}.")
    maps = _without_collisions(list(found.values()))
    if shard is not None:
        number, n_shards = shard
        if not 1 <= number <= n_shards:
            raise ValueError(f"shard {number}/{n_shards} does not exist; pass 1/{n_shards} and on.")
        maps = maps[number - 1 :: n_shards]
    return maps[:limit]


def _named_by(source: str) -> Iterator[MapFile]:
    if source.startswith("@"):
        listed = Path(source[1:]).expanduser()
        for line in listed.read_text().splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield from _named_by(line.strip())
        return
    path = Path(source).expanduser()
    if path.is_dir() and not source.endswith(_IN_FOLDERS):
        yield from _in_folder(path)
    elif glob.has_magic(source) and not path.exists():
        for match in sorted(glob.glob(os.fspath(path), recursive=True)):  # noqa: PTH207
            yield from _named_by(match)
    else:  # a file that is missing is found missing when its turn comes
        yield MapFile(path, PurePosixPath(_EXTENSION.sub("", path.name)))


def _in_folder(folder: Path) -> Iterator[MapFile]:
    is_bids = (folder / "dataset_description.json").is_file()
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in inside.parts)
        if is_hidden or not path.name.endswith(_IN_FOLDERS):
            continue
        stem = _EXTENSION.sub("", path.name)
        if is_bids and stem.rpartition("_")[2] not in _MAP_SUFFIXES:
            continue
        yield MapFile(path, PurePosixPath(inside.parent.as_posix()) / stem)


def _has_entities(name: str, wanted: Mapping[str, Sequence[str]]) -> bool:
    """Return whether the BIDS `name` has one of the values `wanted` for each entity."""
    pairs = (part.partition("-") for part in name.split("_"))
    has = {key: value for key, dash, value in pairs if dash}
    return all(
        has.get(key) in [value.removeprefix(f"{key}-") for value in values]
        for key, values in wanted.items()
    )


def _without_collisions(maps: list[MapFile]) -> list[MapFile]:
    taken: dict[PurePosixPath, Path] = {}
    for one in maps:
        if one.stem in taken:
            raise ValueError(
                f"{taken[one.stem]} and {one.path} would both write {one.stem}_desc-regions_dseg; "
                "name the folder above them instead, or extract them into separate folders."
            )
        taken[one.stem] = one.path
    return maps

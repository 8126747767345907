"""What holds of a whole cohort: all tables in one, the overlap of all regions, the failures."""

import contextlib
import csv
import io as text_io
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from gpuroi import io
from gpuroi.cohort._discover import (
    DESCRIPTION,
    FAILURES,
    OVERLAP,
    PAGE,
    PAGE_FOLDER,
    SUMMARIES,
    TABLE,
    common_folder,
    is_dataset,
)
from gpuroi.cohort._engines import Engine, each_outcome, in_units
from gpuroi.cohort._ledger import Record
from gpuroi.cohort._outputs import one_line
from gpuroi.cohort._tasks import Sum, sum_of, sum_up
from gpuroi.errors import WorkerDiedError
from gpuroi.overlap import Overlap

# Of what is in failures.tsv.
_FAILURE = ("source", "error", "message")

# Maps that are summed up by one process at once: their sums are sent back, one volume each.
_MAPS_A_SUM = 64

_PAGE_DATA = re.compile(r"\d{4,}\.js")


def remove_summary(folder: Path) -> None:
    """Remove the summaries of an earlier run: they are not of what will be there."""
    for name in (TABLE, OVERLAP, FAILURES):
        (folder / name).unlink(missing_ok=True)
    (folder / PAGE).unlink(missing_ok=True)
    remove_page_data(folder)


def remove_page_data(folder: Path) -> None:
    """Remove what lies beside the report of an earlier run."""
    beside = folder / PAGE_FOLDER
    if beside.is_dir():
        for path in list(beside.iterdir()):
            if _PAGE_DATA.fullmatch(path.name):
                path.unlink(missing_ok=True)
        _remove_temporaries(beside, _PAGE_DATA)
        with contextlib.suppress(OSError):  # something of somebody else is in there
            beside.rmdir()


def _remove_temporaries(folder: Path, names: re.Pattern[str]) -> None:
    """Remove what a run has left that was killed while it wrote files of these names."""
    for path in list(folder.glob(".*.tmp")):
        match = io.TEMPORARY.fullmatch(path.name)
        if match and names.fullmatch(match["name"]):
            path.unlink(missing_ok=True)


def write_summary(
    folder: Path, engine: Engine, records: Iterable[Record], sources: Iterable[str]
) -> dict[str, Path]:
    """Write the summaries of all `records`; return their paths.

    In the order of the names, so that the bytes do not depend on which map came first. One map that
    is done has no summary but itself; no failure, no failures.tsv. `sources` are all maps whose
    regions are in the folder.
    """
    made = sorted(records, key=lambda record: record.stem)
    done = [record for record in made if record.status == "done"]
    paths = {"description": folder / DESCRIPTION}
    _remove_temporaries(folder, re.compile("|".join(map(re.escape, SUMMARIES))))
    _remove_temporaries(folder / PAGE_FOLDER, _PAGE_DATA)
    if not is_dataset(folder):  # of somebody else's, this is not ours to describe
        io.write_text(_description(sources, paths["description"]), paths["description"])

    table, overlap_file = folder / TABLE, folder / OVERLAP
    overlap = Overlap()
    if sum(record.n_volumes for record in done) > 1:
        _write_table(table, _sums(folder, engine, done), overlap)
        paths["regions"] = table
    else:
        table.unlink(missing_ok=True)
    if overlap.counts is not None:
        io.write_image(overlap.image(), overlap_file)
        paths["overlap"] = overlap_file
    else:
        overlap_file.unlink(missing_ok=True)
    failed = write_failures(folder, made)
    return paths | ({} if failed is None else {"failures": failed})


def write_failures(folder: Path, records: Iterable[Record]) -> Path | None:
    """Write the failures of `records`; return where, if there are any."""
    path = folder / FAILURES
    failures = [record for record in records if record.status == "failed"]
    if not failures:
        path.unlink(missing_ok=True)
        return None
    io.write_text(_failures(sorted(failures, key=lambda record: record.stem)), path)
    return path


def _sums(folder: Path, engine: Engine, done: list[Record]) -> Iterator[Sum]:
    """Yield the sums of runs of records, in order, as processes make them."""
    # What is sent to the processes is what they need.
    named = (replace(record, message="", warnings=()) for record in done)
    chunks = list(in_units(named, _MAPS_A_SUM))
    place_of = {chunk[0].stem: place for place, chunk in enumerate(chunks)}
    early: dict[int, Sum] = {}
    place = 0
    for chunk, outcome in each_outcome(engine, sum_up, chunks, 1):
        if isinstance(outcome, WorkerDiedError):  # at once: others wait for it, in memory
            outcome = sum_of(folder, chunk)
        early[place_of[chunk[0].stem]] = outcome
        while place in early:
            yield early.pop(place)
            place += 1


def _write_table(path: Path, sums: Iterable[Sum], overlap: Overlap) -> None:
    """Write the rows of all tables, one run after the other, and add up their overlaps."""
    with io.atomic_writer(path) as file:
        header = ""
        for one in sums:
            if not header:
                header = f"map\t{one.header}\n"
                file.write(io.encoded(header))
            file.write(io.encoded("".join(f"{row}\n" for row in one.rows)))
            overlap.merge(one.overlap)


def _failures(failures: list[Record]) -> str:
    stream = text_io.StringIO()
    rows = (  # a row is a line, however many the message has
        [one_line(str(getattr(record, name))) for name in _FAILURE] for record in failures
    )
    csv.writer(stream, delimiter="\t", lineterminator="\n").writerows([_FAILURE, *rows])
    return stream.getvalue()


def _description(sources: Iterable[str], path: Path) -> str:
    """Return what the folder is, with what others have added to an earlier description."""
    from gpuroi import __version__

    described = json.loads(path.read_text("utf-8")) if path.exists() else {}
    description = {
        "Name": described.get("Name", "Regions of statistical maps"),
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [
            {
                "Name": "gpuroi",
                "Version": __version__,
                "Description": "Thresholded maps, in regions: labels, tables and provenance",
            }
        ],
        "SourceDatasets": _source_datasets(sources),
    }
    return json.dumps(described | description, indent=2) + "\n"


def _source_datasets(sources: Iterable[str]) -> list[dict[str, Any]]:
    """Return the BIDS datasets that the maps are of; of the others, the folder they all are in."""

    @cache  # for this call: a folder may become a dataset
    def dataset_of(folder: Path) -> Path | None:
        if is_dataset(folder):
            return folder
        return None if folder.parent == folder else dataset_of(folder.parent)

    folders = {Path(source).parent for source in sources}
    others = [os.fspath(folder) for folder in folders if dataset_of(folder) is None]
    roots = {root for root in map(dataset_of, folders) if root is not None}
    if others:
        roots.add(Path(common_folder(others) or min(others)))
    return [_source_dataset(root) for root in sorted(roots)]


def _source_dataset(root: Path) -> dict[str, Any]:
    """Return where a dataset is; of a BIDS one, its DOI, too."""
    source = {"URL": root.as_uri()}
    try:
        described = json.loads((root / DESCRIPTION).read_text("utf-8"))
        doi = described.get("DatasetDOI")
    except (OSError, ValueError, AttributeError):
        return source
    return source | ({"DOI": doi} if isinstance(doi, str) else {})

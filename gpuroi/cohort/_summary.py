"""What holds of a whole cohort: all tables in one, the overlap of all regions, the failures."""

import csv
import io as text_io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from gpuroi import io
from gpuroi.cohort._ledger import Record
from gpuroi.overlap import Overlap

# Of what is in failures.tsv.
_FAILURE = ("source", "error", "message")


def write_summary(folder: Path, records: Iterable[Record], parameters: str) -> dict[str, Path]:
    """Write the summaries of all `records` made with `parameters`; return their paths.

    In the order of the names, so that the bytes do not depend on which map came first.
    """
    made = [record for record in records if record.parameters == parameters]
    made.sort(key=lambda record: record.stem)
    done = [record for record in made if record.status == "done"]
    paths = {
        "regions": folder / "regions.tsv",
        "failures": folder / "failures.tsv",
        "description": folder / "dataset_description.json",
    }
    io.write_text(_all_tables(folder, done), paths["regions"])
    failures = [
        [getattr(record, name) for name in _FAILURE] for record in made if record.status == "failed"
    ]
    io.write_text(_tsv([_FAILURE, *failures]), paths["failures"])
    io.write_text(_description(), paths["description"])
    overlap = _overlap(folder, done)
    if overlap is not None:
        paths["overlap"] = folder / "overlap.nii.gz"
        io.write_image(overlap, paths["overlap"])
    return paths


def _all_tables(folder: Path, done: list[Record]) -> str:
    """Return the rows of all tables, each after the name of its map."""
    lines: list[str] = []
    for record in done:
        for name in sorted(name for name in record.outputs if name.endswith(".tsv")):
            header, *rows = (folder / name).read_text().splitlines()
            if not lines:
                lines.append(f"map\t{header}")
            label = name.removesuffix("_desc-regions_dseg.tsv")
            lines += [f"{label}\t{row}" for row in rows]
    return "\n".join([*lines, ""])


def _overlap(folder: Path, done: list[Record]) -> nib.Nifti1Image | None:
    """Return in how many maps each voxel lies in a region, or None if grids differ."""
    overlap = Overlap()
    for record in done:
        for name in sorted(name for name in record.outputs if name.endswith(".nii.gz")):
            image = io.load(folder / name)
            labels = np.asanyarray(image.dataobj)
            overlap.add(np.flatnonzero(labels), labels.shape, image.affine, image.header)
    return None if overlap.counts is None else overlap.image()


def _description() -> str:
    from gpuroi import __version__

    description = {
        "Name": "Regions of statistical maps",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "gpuroi", "Version": __version__}],
    }
    return json.dumps(description, indent=2) + "\n"


def _tsv(rows: Iterable[Iterable[Any]]) -> str:
    stream = text_io.StringIO()
    csv.writer(stream, delimiter="\t", lineterminator="\n").writerows(rows)
    return stream.getvalue()

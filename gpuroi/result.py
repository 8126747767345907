"""What the native door returns: the regions of one map."""

import json
import os
import re
from dataclasses import dataclass
from functools import cache, cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpuroi.algorithms.measure import RegionVoxels, measure
from gpuroi.types import Provenance

if TYPE_CHECKING:
    import nibabel as nib
    import pandas as pd

_encode = json.JSONEncoder().encode
#: Extensions of what `Regions.save` writes, by kind.
EXTENSIONS = {"labels": ".nii.gz", "table": ".tsv", "provenance": ".json"}

#: What the command line and cohorts put between the name of a map and the extensions.
ENDING = "_desc-regions_dseg"

_EXTENSION = re.compile(f"({'|'.join(map(re.escape, EXTENSIONS.values()))})$")
_VOLUME = re.compile(r"\[\d+\]$")
_SEPARATORS = tuple(filter(None, (os.sep, os.altsep)))

#: Columns of `Regions.table`.
COLUMNS = {
    "label": "value of the region's voxels in the label image",
    "sign": "1 for a region of values above zero, -1 below",
    "voxels": "number of voxels",
    "volume_mm3": "volume in cubic millimetres",
    "peak_value": "value of largest magnitude, in map units",
    "peak_x": "x of the peak in mm",
    "peak_y": "y of the peak in mm",
    "peak_z": "z of the peak in mm",
    "mean_value": "mean of the voxels' values, in map units",
    "center_of_mass_x": "x of the centre of mass (weights: magnitudes) in mm",
    "center_of_mass_y": "y of the centre of mass in mm",
    "center_of_mass_z": "z of the centre of mass in mm",
    "touches_edge": "whether a voxel lies on the border of the field of view",
}


#: Columns of the ``.tsv``; BIDS asks for the first two.
COLUMNS_ON_DISK = {"index": COLUMNS["label"], "name": "name of the region"} | {
    name: meaning for name, meaning in COLUMNS.items() if name != "label"
}


@cache
def _column_names() -> "pd.Index[str]":
    """Return `COLUMNS` as pandas' index, made once: for small maps it is a tenth of the table."""
    import pandas as pd

    return pd.Index(COLUMNS)


@dataclass(frozen=True, eq=False)
class Regions:
    """The regions of one map: labels, a table, the cut-off applied, and how they were made.

    Only the voxels of the regions are held; images and the table are built when first asked for.

    Attributes
    ----------
    cutoff : float
        Magnitude that voxels had to reach, in map units, after rounding to the map's dtype.
        Infinite where the percentile had no voxel to rank.
    provenance : mapping
        Versions, backend, device, parameters and counts; JSON-serialisable.
    affine : float64 array (4, 4)
        Voxel to mm.
    header : nibabel header
        Of the map; label images take their space and units from it.
    voxels : RegionVoxels
        Flat indices, values and region boundaries.
    """

    voxels: RegionVoxels
    affine: NDArray[np.float64]
    header: Any
    cutoff: float
    provenance: Provenance

    def __len__(self) -> int:
        """Return the number of regions."""
        return len(self.voxels)

    def __repr__(self) -> str:
        return (
            f"Regions({len(self)} regions of {self.voxels.index.size} voxels, "
            f"cutoff={self.cutoff:g}, backend={self.provenance['backend']!r})"
        )

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """Labels (X, Y, Z), 0 is background."""
        return self.voxels.labels()

    @cached_property
    def labels_img(self) -> "nib.Nifti1Image":
        """Label image (X, Y, Z) int32 in the space of the map; 0 is background."""
        from gpuroi.io import labels_image

        return labels_image(self.labels, self.affine, self.header)

    @cached_property
    def table(self) -> "pd.DataFrame":
        """One row a region; the columns are those of `gpuroi.result.COLUMNS`."""
        import pandas as pd

        columns = dict(enumerate(self._measured()))
        table = pd.DataFrame(columns, index=pd.RangeIndex(len(self)), copy=False)
        table.columns = _column_names()[:]  # a new one: tables are their owners' to change
        return table

    def _measured(self) -> tuple[NDArray[Any], ...]:
        """Return the columns of the table, in the order of `COLUMNS`."""
        measures = measure(self.voxels)
        rotation, origin = self.affine[:3, :3], self.affine[:3, 3]
        peak_mm = measures.peak @ rotation.T + origin
        center_mm = measures.center_of_mass @ rotation.T + origin
        return (
            np.arange(1, len(self) + 1, dtype=np.int32),
            measures.sign,
            measures.voxels,
            measures.voxels * self.provenance["voxel_volume_mm3"],
            measures.peak_value,
            *peak_mm.T,
            measures.mean_value,
            *center_mm.T,
            measures.touches_edge,
        )

    def _tsv(self) -> str:
        """Return the table as text, with the columns of `COLUMNS_ON_DISK`.

        What pandas would write, in a fifth of the time: a cohort writes many small tables.
        """
        index, *others = (column.tolist() for column in self._measured())
        names = [f"region-{label}" for label in index]
        rows = zip(index, names, *others, strict=True)
        lines = ("\t".join("n/a" if cell != cell else str(cell) for cell in row) for row in rows)
        return "\n".join(["\t".join(COLUMNS_ON_DISK), *lines, ""])

    def to_4d_img(self) -> "nib.Nifti1Image":
        """Return nilearn's stack (X, Y, Z, n) float32: each region's values in a volume of its own.

        The image is lazy: slicing ``dataobj`` allocates what it returns, and ``to_filename`` writes
        volume by volume. ``get_fdata()`` makes everything dense.

        Returns
        -------
        nibabel.Nifti1Image

        Raises
        ------
        ValueError
            If there is no region: NIfTI has no image of zero volumes.
        """
        from gpuroi.stack import stack_image

        if len(self) == 0:
            raise ValueError("there are no regions to stack; check len(regions) first.")
        return stack_image([self.voxels], self.affine, self.header)

    def save(self, prefix: str | PathLike[str]) -> dict[str, Path]:
        """Write the label image, the table and the provenance, each whole or not at all.

        They are written as they were found: changes to `labels` or `table` are not.

        Parameters
        ----------
        prefix : path
            Everything before the extensions: ``out/sub-01_desc-regions_dseg`` writes
            ``…_dseg.nii.gz`` (smallest integer type), ``…_dseg.tsv`` and ``…_dseg.json``. One of
            these extensions at its end is left out.

        Returns
        -------
        dict
            The paths by their kind: ``labels``, ``table``, ``provenance``.

        Raises
        ------
        ValueError
            If `prefix` is a folder, and no name in it, or the map itself would be replaced.
        OSError
            If a file cannot be written.
        """
        from gpuroi import io

        prefix = without_extension(prefix)
        files = self.files()
        paths = {kind: Path(f"{prefix}{extension}") for kind, (extension, _) in files.items()}
        source = _VOLUME.sub("", self.provenance["source"])
        if paths["labels"].exists() and os.path.realpath(paths["labels"]) == os.path.realpath(
            source
        ):
            raise ValueError(f"{source} is the map itself; pass a prefix of another name.")
        prefix.parent.mkdir(parents=True, exist_ok=True)
        for kind, (_, content) in files.items():
            io.write_bytes(content, paths[kind])
        return paths

    def files(self) -> dict[str, tuple[str, bytes]]:
        """Return what `save` writes.

        Returns
        -------
        dict
            The extension and the content of each kind of file: ``labels``, ``table`` and
            ``provenance``.
        """
        from gpuroi import io

        # In the order of the file, and from the voxels: a volume in any other would be turned.
        labels = np.zeros(self.voxels.shape, io.smallest_label_dtype(len(self)), order="F")
        numbers = np.arange(1, len(self) + 1, dtype=labels.dtype)
        labels[self.voxels.coordinates] = np.repeat(numbers, np.diff(self.voxels.starts))
        sidecar = dict(self.provenance) | {"columns": COLUMNS_ON_DISK}
        contents = {
            "labels": io.compressed_labels(labels, self.affine, self.header),
            "table": self._tsv().encode(),
            "provenance": _json(sidecar).encode(),
        }
        return {kind: (EXTENSIONS[kind], content) for kind, content in contents.items()}


def _json(sidecar: dict[str, Any]) -> str:
    """Return JSON with an entry a line: easily read, and made in a fifth of the time of indents."""
    lines = [f"  {_encode(name)}: {_encode(value)}" for name, value in sidecar.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def without_extension(prefix: str | PathLike[str]) -> Path:
    """Return what comes before the extensions of the files that `Regions.save` writes.

    Raises
    ------
    ValueError
        If `prefix` is a folder, and no name in it.
    """
    path = Path(_EXTENSION.sub("", os.fspath(prefix))).expanduser()
    if os.fspath(prefix).endswith(_SEPARATORS) or path.name in ("", "..") or path.is_dir():
        raise ValueError(
            f"{os.fspath(prefix)} is a folder; add what the names of the files begin with, such as "
            f"{path / f'sub-01{ENDING}'}."
        )
    return path

"""Results read back from disk."""

import json
import re
from os import PathLike
from pathlib import Path

import numpy as np

from gpuroi import io
from gpuroi.algorithms.measure import gather
from gpuroi.arrays import computable
from gpuroi.backends import LabelledVoxels
from gpuroi.errors import InvalidMapError
from gpuroi.result import Regions, without_extension
from gpuroi.space import same_grid
from gpuroi.types import ImageLike, Provenance
from gpuroi.words import cutoff_of

_VOLUME = re.compile(r"\[(\d+)\]$")


def load_regions(path: str | PathLike[str], img: ImageLike) -> Regions:
    """Return the regions that `Regions.save`, the command line or a cohort has written.

    Labels and provenance are read; the table is measured again on the map, which is not stored
    with them.

    Parameters
    ----------
    path : path
        The prefix that was saved to, such as ``out/sub-01_desc-regions_dseg``, or one of the files.
    img : path or nibabel image
        The map of these regions, or the series that it is a volume of.

    Returns
    -------
    Regions
        Equal to those that were saved: labels int32, values in map units, the table, the cut-off
        and the provenance.

    Raises
    ------
    InvalidMapError
        If the files or the map cannot be read, or the map is another than the regions were made of,
        by its checksum (of maps in memory, nothing but the grid is checked). It is a `ValueError`.
    ValueError
        If `path` is a folder.
    TypeError
        If `img` is neither a path nor an image.

    Examples
    --------
    >>> import tempfile, gpuroi, nibabel as nib, numpy as np
    >>> data = np.zeros((8, 8, 8), np.float32)
    >>> data[1:4, 1:4, 1:4] = 5.0
    >>> img = nib.Nifti1Image(data, np.eye(4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = gpuroi.extract_regions(img, 3.0).save(f"{folder}/m_desc-regions_dseg")
    ...     regions = gpuroi.load_regions(f"{folder}/m_desc-regions_dseg", img)
    >>> regions.cutoff, regions.table["voxels"].tolist()
    (3.0, [27])
    """
    prefix = without_extension(path)
    volumes = io.read_maps(img)
    if len(volumes) == 1:
        return read_back(prefix, volumes[0])
    number = _VOLUME.search(provenance_of(prefix).get("source", ""))
    if number is None or int(number[1]) >= len(volumes):
        raise InvalidMapError(
            f"{prefix}.json: expected the number of one of the {len(volumes)} volumes of "
            f"{io.describe(img)} at the end of its source, found none; pass that volume alone."
        )
    return read_back(prefix, volumes[int(number[1])])


def provenance_of(prefix: Path) -> Provenance:
    """Return how the regions saved to `prefix` were made."""
    path = Path(f"{prefix}.json")
    try:
        sidecar = json.loads(path.read_text("utf-8"))
        del sidecar["columns"]  # a description of the table, put there for the file
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidMapError(
            f"{path}: expected the provenance of regions, found none that can be read ({error})."
        ) from error
    provenance: Provenance = sidecar
    return provenance


def read_back(prefix: Path, source: io.Map) -> Regions:
    """Return the regions saved to `prefix`, with the values of the map `source`."""
    provenance = provenance_of(prefix)
    made_of = provenance.get("source_sha256")
    if made_of is not None and source.sha256 not in (None, made_of):
        raise InvalidMapError(
            f"{prefix}.json: expected the map with the SHA-256 {made_of}, found another in "
            f"{source.name}; pass the map that the regions were made of, or make them again."
        )
    path = f"{prefix}.nii.gz"
    (labels,) = io.read_maps(path)
    shape = source.data.shape
    if not same_grid(labels.data.shape, labels.affine, shape, source.affine):
        raise InvalidMapError(
            f"{path}: expected labels on the grid of {source.name}, shape {shape}, found another "
            f"grid, shape {labels.data.shape}; pass the map that they were made of."
        )
    flat = labels.data.ravel()
    index = np.flatnonzero(flat)
    found = LabelledVoxels(index, flat[index].astype(np.int32), provenance["regions"])
    return Regions(
        voxels=gather(found, computable(source.data)),
        affine=source.affine,
        header=source.header,
        cutoff=cutoff_of(provenance),
        provenance=provenance,
    )

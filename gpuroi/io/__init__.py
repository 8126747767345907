"""Maps and masks in, labels and tables out: the only place that reads and writes image files."""

from gpuroi.io._read import Map, describe, load, read_data, read_maps, real_voxels
from gpuroi.io._write import (
    TEMPORARY,
    atomic_writer,
    compressed,
    compressed_labels,
    encoded,
    labels_image,
    nifti_header,
    smallest_label_dtype,
    write_bytes,
    write_image,
    write_text,
)

__all__ = [
    "TEMPORARY",
    "Map",
    "atomic_writer",
    "compressed",
    "compressed_labels",
    "describe",
    "encoded",
    "labels_image",
    "load",
    "nifti_header",
    "read_data",
    "read_maps",
    "real_voxels",
    "smallest_label_dtype",
    "write_bytes",
    "write_image",
    "write_text",
]

"""Labels and tables out: each file whole or not at all, the same bytes for the same content."""

import io
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from isal import igzip
from numpy.typing import NDArray

#: What `atomic_writer` calls a file until it is whole.
TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+-[0-9a-f]{8}\.tmp", re.DOTALL)


def labels_image(
    labels: NDArray[np.integer], affine: NDArray[np.float64], header: Any
) -> nib.Nifti1Image:
    """Return `labels` as a NIfTI image in the space of `header`: codes and units are kept."""
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    new_header = nifti_header(header, image_class.header_class)
    new_header.set_data_dtype(labels.dtype)
    new_header.set_data_shape(labels.shape)
    new_header.set_slope_inter(1, 0)
    new_header.set_intent("label", name="regions")
    new_header["cal_min"], new_header["cal_max"] = 0, labels.max(initial=0)
    new_header["descrip"] = b""
    new_header.extensions.clear()
    return image_class(labels, affine, new_header)


def compressed_labels(
    labels: NDArray[np.integer], affine: NDArray[np.float64], header: Any
) -> bytes:
    """Return ``compressed(labels_image(...))``, soonest for `labels` in Fortran's order.

    The header is made by nibabel, once for all maps that have the same one.
    """
    nifti = header if isinstance(header, nib.Nifti1Header) else nifti_header(header)
    header_class: Any = type(nifti)
    label_header = _labels_header(
        header_class,
        nifti.endianness,
        nifti.binaryblock,
        affine.tobytes(),
        labels.shape,
        labels.dtype,
    )
    fields = label_header.structarr.copy()
    fields["cal_max"] = labels.max(initial=0)
    in_file_order = labels.astype(label_header.get_data_dtype(), copy=False).ravel(order="F")
    no_extensions = bytes(4)
    content = b"".join((fields.tobytes(), no_extensions, in_file_order.data))
    return _gzipped(content)


@lru_cache(maxsize=16)
def _labels_header(
    header_class: Any,
    endianness: str,
    block: bytes,
    affine: bytes,
    shape: tuple[int, ...],
    dtype: np.dtype[np.integer],
) -> Any:
    """Return the header that nibabel writes in front of labels, but for their maximum."""
    blank = labels_image(
        np.broadcast_to(np.zeros((), dtype), shape),
        np.frombuffer(affine).reshape(4, 4),
        header_class(block, endianness, check=False),
    )
    header: Any = blank.header.copy()
    header.set_slope_inter(1, 0)
    header.write_to(io.BytesIO())  # this sets where the voxels begin
    return header


def nifti_header(header: Any, header_class: Any = nib.Nifti1Header) -> Any:
    """Return `header` as a new header of `header_class`."""
    # A plain copy of one that is of that class already spares nibabel's battery of checks.
    return header.copy() if type(header) is header_class else header_class.from_header(header)


def smallest_label_dtype(n_labels: int) -> np.dtype[np.integer]:
    """Return the smallest integer type of NIfTI-1 tools that holds labels up to `n_labels`."""
    for dtype in (np.uint8, np.int16, np.int32):
        if n_labels <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    raise ValueError(f"{n_labels} labels do not fit into 32 bits.")


@contextmanager
def atomic_writer(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends, and vanishes if it fails.

    Without `sync` it may be found empty after a power cut, though never after a crash.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as stream:
            yield stream
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def compressed(image: nib.Nifti1Image) -> bytes:
    """Return the content of a ``.nii.gz`` file, the same bytes for the same image."""
    stream = io.BytesIO()
    image.to_stream(stream)
    return _gzipped(stream.getvalue())


def _gzipped(content: bytes) -> bytes:
    return igzip.compress(content, compresslevel=2, mtime=0)


def write_image(image: nib.Nifti1Image, path: Path) -> None:
    """Write `image` to a ``.nii.gz`` file."""
    write_bytes(compressed(image), path)


def encoded(text: str) -> bytes:
    """Return `text` in UTF-8, bytes of file names that are no UTF-8 as they are."""
    return text.encode("utf-8", "surrogateescape")


def write_text(text: str, path: Path) -> None:
    """Write `text` in UTF-8."""
    write_bytes(encoded(text), path)


def write_bytes(content: bytes, path: Path, *, sync: bool = True) -> None:
    """Write `content` whole or not at all; see `atomic_writer`."""
    with atomic_writer(path, sync=sync) as file:
        file.write(content)

"""Maps and masks in, labels and tables out: the only place that reads and writes image files."""

import io
import math
import os
import secrets
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from gpuroi.errors import DimensionError, InvalidMapError
from gpuroi.space import check_affine, voxel_volume_mm3
from gpuroi.types import ImageLike

_GZIP_MAGIC = b"\x1f\x8b"
# Any, because isal's stubs call its exception class an instance. OSError is gzip's BadGzipFile.
_GZIP_ERRORS: Any = (isal_zlib.error, EOFError, OSError)
_NIFTI_CLASSES = (nib.Nifti1Image, nib.Nifti2Image)
_NIFTI_PAIRS = (nib.Nifti1Pair, nib.Nifti2Pair)  # .hdr and .img
_HEADER_ERRORS = (
    HeaderDataError,
    ImageFileError,
    WrapStructError,
    ValueError,
    KeyError,
    OverflowError,
)
_VOXEL_ERRORS = (OSError, ValueError, EOFError, zlib.error)


@dataclass(frozen=True)
class Map:
    """One 3-D map, as stored: any real dtype, any memory layout."""

    name: str
    data: NDArray[np.generic]  # (X, Y, Z)
    affine: NDArray[np.float64]  # voxel to mm
    header: Any

    @cached_property
    def voxel_volume_mm3(self) -> float:
        """Volume of one voxel."""
        return voxel_volume_mm3(self.affine)


def describe(source: ImageLike) -> str:
    """Return what an error message calls `source`: its path if it has one."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    filename = source.get_filename() if isinstance(source, SpatialImage) else None
    return filename or f"<{type(source).__name__} in memory>"


def load(source: ImageLike) -> SpatialImage:
    """Return `source` as a nibabel image; its files are read whole and verified.

    Gzip streams must decompress with the checksum and length of their trailers, and the data of a
    NIfTI image must fill the file exactly. (nibabel stops reading before the trailer, so that most
    damage to a compressed file goes unnoticed.) What is in the file decides, not its extension.

    Raises
    ------
    InvalidMapError
        If the file is missing, damaged, or of no format that nibabel reads.
    TypeError
        If `source` is neither a path nor a nibabel image.
    """
    if isinstance(source, SpatialImage):
        return source
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"a {type(source).__name__} is not an image; pass a path or a nibabel image."
        )
    path = Path(source).expanduser()
    raw = _read_whole(path)
    for image_class in _NIFTI_CLASSES:
        if image_class.header_class.may_contain_header(raw[:1024]) and _is_single_file(raw):
            return _nifti_from_bytes(path, image_class, raw)
    if path.name.lower().endswith((".nii", ".nii.gz")):
        raise InvalidMapError(
            f"{path}: expected a NIfTI header at its start, found {raw[:4].hex(' ')}; the file is "
            "no NIfTI image or its header is damaged."
        )
    return _other_format(path)


def _read_whole(path: Path) -> bytes:
    """Return the bytes of a file, decompressed and checked where they are gzip's."""
    if not path.exists():
        raise InvalidMapError(f"{path}: no such file.")
    if not path.is_file():
        found = "a folder" if path.is_dir() else "a pipe or a device"
        raise InvalidMapError(f"{path}: expected an image file, found {found}.")
    raw = path.read_bytes()
    if not raw:
        raise InvalidMapError(f"{path}: expected an image, found an empty file.")
    return _decompress(path, raw) if raw[:2] == _GZIP_MAGIC else raw


def _decompress(path: Path, compressed: bytes) -> bytes:
    try:
        return bytes(igzip.decompress(compressed))
    except _GZIP_ERRORS as error:
        raise InvalidMapError(
            f"{path}: expected a whole gzip stream, found one that is damaged, cut short or "
            f"followed by other bytes ({error}); fetch or write it again."
        ) from error


def _is_single_file(raw: bytes) -> bool:
    # A .hdr of a pair carries "ni1"; its data are in an .img beside it.
    return raw[344:347] == b"n+1" or raw[4:7] == b"n+2"


def _nifti_from_bytes(path: Path, image_class: Any, raw: bytes) -> SpatialImage:
    try:
        image = image_class.from_bytes(raw)
    except _HEADER_ERRORS as error:
        raise InvalidMapError(
            f"{path}: expected a valid NIfTI header, found a damaged one ({error})."
        ) from error
    _check_length(path, image, len(raw))
    # Not image.set_filename, which takes none of the extensions that nibabel does not know.
    image.file_map["image"].filename = os.fspath(path)
    return cast(SpatialImage, image)


def _other_format(path: Path) -> SpatialImage:
    """Return a NIfTI pair, or an image of any other format that nibabel reads."""
    try:
        image = nib.load(path)
    except Exception as error:  # nibabel's readers raise whatever they trip over
        raise InvalidMapError(
            f"{path}: expected NIfTI or another format that nibabel reads, found something else or "
            f"a damaged file ({type(error).__name__}: {error})."
        ) from error
    if not isinstance(image, SpatialImage):
        raise InvalidMapError(f"{path}: expected a volume, found a {type(image).__name__}.")
    kinds = [kind for kind in ("header", "image") if kind in image.file_map]
    paths = [Path(cast(str, image.file_map[kind].filename)) for kind in kinds]
    n_bytes = [len(_read_whole(part)) for part in paths]  # a damaged gzip stream ends here
    if type(image) in _NIFTI_PAIRS:
        _check_length(paths[-1], image, n_bytes[-1])
    return image


def _check_length(path: Path, image: Any, n_found: int) -> None:
    """Raise `InvalidMapError` unless the data of a NIfTI `image` end where its file ends."""
    shape, dtype = image.header.get_data_shape(), image.header.get_data_dtype()
    if min(shape) < 1:
        raise InvalidMapError(f"{path}: expected a valid NIfTI header, found dimensions {shape}.")
    offset, n_bytes = image.dataobj.offset, math.prod(shape) * dtype.itemsize
    if n_found != offset + n_bytes:
        raise InvalidMapError(
            f"{path}: its header announces {offset} + {n_bytes} bytes for data of shape {shape} "
            f"and type {dtype}, the file holds {n_found} "
            f"({'cut short' if n_found < offset + n_bytes else 'trailing garbage'})."
        )


def real_voxels(image: SpatialImage, name: str) -> NDArray[Any]:
    """Return the voxels of `image`, scaled, in their own dtype and layout.

    Raises
    ------
    InvalidMapError
        If they cannot be read, or are complex or RGB.
    """
    try:
        data = np.asanyarray(image.dataobj)
    except _VOXEL_ERRORS as error:
        raise InvalidMapError(f"{name}: its voxels cannot be read ({error}).") from error
    if data.dtype.kind not in "fiub":
        kind = {"V": "RGB", "c": "complex"}.get(data.dtype.kind, "no numbers")
        raise InvalidMapError(
            f"{name}: its voxels are {kind} ({data.dtype}); expected one real number a voxel."
        )
    return data


def read_data(image: SpatialImage, name: str) -> NDArray[Any]:
    """Return `real_voxels` without trailing axes of length one behind the third.

    Raises
    ------
    InvalidMapError
        As `real_voxels`, and if there are fewer than 3 or more than 4 axes.
    """
    data = real_voxels(image, name)
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim not in (3, 4):
        raise DimensionError(
            f"{name}: expected a 3-D map or a 4-D series of maps, got shape {data.shape}."
        )
    return data


def read_maps(source: ImageLike) -> list[Map]:
    """Return the volumes of a 3-D or 4-D image as 3-D maps, named ``name`` or ``name[volume]``."""
    name = describe(source)
    image = load(source)
    data = read_data(image, name)
    affine = check_affine(image.affine, name)
    if data.ndim == 3:
        return [Map(name, data, affine, image.header)]
    return [
        Map(f"{name}[{volume}]", data[..., volume], affine, image.header)
        for volume in range(data.shape[-1])
    ]


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
    return igzip.compress(stream.getvalue(), compresslevel=2, mtime=0)


def write_image(image: nib.Nifti1Image, path: Path) -> None:
    """Write `image` to a ``.nii.gz`` file."""
    write_bytes(compressed(image), path)


def write_text(text: str, path: Path) -> None:
    """Write `text` in UTF-8."""
    write_bytes(text.encode(), path)


def write_bytes(content: bytes, path: Path, *, sync: bool = True) -> None:
    """Write `content` whole or not at all; see `atomic_writer`."""
    with atomic_writer(path, sync=sync) as file:
        file.write(content)

"""Maps in: files read whole and verified, voxels as they are stored."""

import hashlib
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from glob import has_magic
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
from isal import isal_zlib
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage
from nibabel.volumeutils import apply_read_scaling
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from gpuroi.errors import DimensionError, InvalidMapError
from gpuroi.space import check_affine, voxel_volume_mm3
from gpuroi.types import ImageLike

_GZIP_MAGIC = b"\x1f\x8b"
# Any, because isal's stubs call its exception class an instance. OSError is gzip's BadGzipFile.
_GZIP_ERRORS: Any = (isal_zlib.error, EOFError, OSError)
_GzipReader: Any = isal_zlib._GzipReader  # Any, because its stubs know nothing of bytes
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
_GZIP_LENGTH_BYTES = 4
# Of what is passed in an image's place now and then.
_HINTS = {
    "NoneType": "; where no region is left, connected_regions returns None: lower the threshold "
    "or min_region_size",
    "Regions": ", such as regions.labels_img or regions.to_4d_img()",
    "SurfaceImage": "; surfaces have no voxels, and are nilearn's alone",
}
_SINGLE_TINY, _SINGLE_MAX = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Map:
    """One 3-D map, as stored: any real dtype, any memory layout."""

    name: str
    data: NDArray[np.generic]  # (X, Y, Z)
    affine: NDArray[np.float64]  # voxel to mm
    header: Any
    sha256: str | None = None  # of its file as it is on disk, the .img of a pair; None in memory

    @cached_property
    def voxel_volume_mm3(self) -> float:
        """Volume of one voxel."""
        return voxel_volume_mm3(self.affine)


def describe(source: ImageLike) -> str:
    """Return what an error message calls `source`: its path if it has one."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    # nilearn's template, an image that loads itself late, has no file map.
    has_files = isinstance(source, SpatialImage) and hasattr(source, "file_map")
    filename = source.get_filename() if has_files else None
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
    path = _checked_path(source)
    raw = _decompressed(path, _on_disk(path))
    image_class = _single_file_class(path, raw)
    if image_class is None:
        return _other_format(path)
    with _header_errors(path):
        image = image_class.from_bytes(raw)
    _check_length(path, image, len(raw))
    # Not image.set_filename, which takes none of the extensions that nibabel does not know.
    image.file_map["image"].filename = os.fspath(path)
    return cast(SpatialImage, image)


def _checked_path(source: Any) -> Path:
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"a {type(source).__name__} is not an image; pass a path or a nibabel image"
            f"{_HINTS.get(type(source).__name__, '')}."
        )
    if os.fspath(source) == "":
        raise InvalidMapError("an empty path names no image; is a variable not set?")
    return Path(source).expanduser()


def _on_disk(path: Path) -> bytes:
    """Return the bytes of a file."""
    if not path.exists():
        hint = "; where one path is asked for, patterns are not" if has_magic(path.name) else ""
        if path.is_symlink():
            hint = f"; it is a link to {path.readlink()}"
        raise InvalidMapError(f"{path}: no such file{hint}.")
    if not path.is_file():
        found = "a folder" if path.is_dir() else "a pipe or a device"
        raise InvalidMapError(f"{path}: expected an image file, found {found}.")
    on_disk = path.read_bytes()
    if not on_disk:
        raise InvalidMapError(f"{path}: expected an image, found an empty file.")
    return on_disk


def _decompressed(path: Path, on_disk: bytes) -> bytes:
    """Return what was on disk, decompressed and checked if it is gzip's."""
    if on_disk[:2] != _GZIP_MAGIC:
        return on_disk
    # `igzip.decompress` reads by `readall`, whose buffer grows: a third slower than one of the
    # length that the trailer tells. The reader itself has no more than ten times what is on disk.
    announced = int.from_bytes(on_disk[-_GZIP_LENGTH_BYTES:], "little")
    n_wanted = max(announced, len(on_disk))
    try:
        reader = _GzipReader(on_disk)
        parts = list(iter(lambda: reader.read(n_wanted), b""))
    except _GZIP_ERRORS as error:
        raise InvalidMapError(
            f"{path}: expected a whole gzip stream, found one that is damaged, cut short or "
            f"followed by other bytes ({error}); fetch or write it again."
        ) from error
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _single_file_class(path: Path, raw: bytes) -> Any:
    """Return the class of a NIfTI image in one file, None for a pair or another format."""
    for image_class in _NIFTI_CLASSES:
        # A .hdr of a pair carries "ni1"; its data are in an .img beside it.
        is_single = raw[344:347] == b"n+1" or raw[4:7] == b"n+2"
        if is_single and image_class.header_class.may_contain_header(raw[:1024]):
            return image_class
    if path.name.lower().endswith((".nii", ".nii.gz")):
        raise InvalidMapError(
            f"{path}: expected a NIfTI header at its start, found {raw[:4].hex(' ')}; the file is "
            "no NIfTI image or its header is damaged."
        )
    return None


@contextmanager
def _header_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except _HEADER_ERRORS as error:
        raise InvalidMapError(
            f"{path}: expected a valid NIfTI header, found a damaged one ({error})."
        ) from error


def _shared_header(path: Path, image_class: Any, raw: bytes) -> Any:
    """Return an image that has the header, affine and scaling of `raw`, but no voxels.

    Files with the same header share it: it is only to be read.
    """
    n_bytes = image_class.header_class.sizeof_hdr
    has_extensions = raw[n_bytes : n_bytes + 1] != b"\0"
    with _header_errors(path):
        if has_extensions:
            return image_class.from_bytes(raw)
        return _parsed_header(image_class, raw[: n_bytes + 4])


@lru_cache(maxsize=16)
def _parsed_header(image_class: Any, header: bytes) -> Any:
    return image_class.from_bytes(header)


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
    # A damaged gzip stream ends here.
    n_bytes = [len(_decompressed(part, _on_disk(part))) for part in paths]
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
    with _voxel_errors(name):
        data = np.asanyarray(image.dataobj)
    _check_real(data.dtype, name)
    return data


@contextmanager
def _voxel_errors(name: str) -> Iterator[None]:
    try:
        yield
    except _VOXEL_ERRORS as error:
        raise InvalidMapError(f"{name}: its voxels cannot be read ({error}).") from error


def _check_real(dtype: np.dtype[Any], name: str) -> None:
    if dtype.kind not in "fiub":
        kind = {"V": "RGB", "c": "complex"}.get(dtype.kind, "no numbers")
        raise InvalidMapError(
            f"{name}: its voxels are {kind} ({dtype}); expected one real number a voxel."
        )


def read_data(image: SpatialImage, name: str) -> NDArray[Any]:
    """Return `real_voxels` without trailing axes of length one behind the third.

    Raises
    ------
    InvalidMapError
        As `real_voxels`, and if there are fewer than 3 or more than 4 axes.
    """
    return _map_or_series(real_voxels(image, name), name)


def _map_or_series(data: NDArray[Any], name: str) -> NDArray[Any]:
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim not in (3, 4):
        raise DimensionError(
            f"{name}: expected a 3-D map or a 4-D series of maps, got shape {data.shape}."
        )
    return data


def read_maps(source: ImageLike) -> list[Map]:
    """Return the volumes of a 3-D or 4-D image as 3-D maps, named ``name`` or ``name[volume]``.

    Integers of up to 16 bits with a slope or an intercept become float32, off by less than a
    fiftieth of a step between them; nibabel makes them float64, in twice the time and memory.
    Where float32 cannot tell the steps apart, and for all other types, voxels are nibabel's.
    They may be read-only.

    Raises
    ------
    InvalidMapError
        As `load` and `read_data`, and if the affine is singular or not finite.
    """
    name = describe(source)
    if isinstance(source, SpatialImage):
        return _maps(name, _map_voxels(source, name), source.affine, source.header, None)
    path = _checked_path(source)
    on_disk = _on_disk(path)
    sha256 = _sha256(on_disk)  # first: it would push the voxels out of the processor's cache
    raw = _decompressed(path, on_disk)
    image_class = _single_file_class(path, raw)
    if image_class is None:
        image = _other_format(path)
        data = _map_voxels(image, name)
        sha256 = _sha256(_on_disk(Path(cast(str, image.file_map["image"].filename))))
        return _maps(name, data, image.affine, image.header, sha256)
    shared = _shared_header(path, image_class, raw)
    _check_length(path, shared, len(raw))
    proxy = shared.dataobj
    _check_real(proxy.dtype, name)
    stored = np.frombuffer(raw, proxy.dtype, offset=proxy.offset).reshape(proxy.shape, order="F")
    data = _scaled(stored, proxy.slope, proxy.inter)
    return _maps(name, data, shared.affine.copy(), shared.header.copy(), sha256)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _maps(
    name: str, data: NDArray[Any], affine: NDArray[np.float64], header: Any, sha256: str | None
) -> list[Map]:
    data = _map_or_series(data, name)
    check_affine(affine, name)
    if data.ndim == 3:
        return [Map(name, data, affine, header, sha256)]
    return [
        Map(f"{name}[{volume}]", data[..., volume], affine, header, sha256)
        for volume in range(data.shape[-1])
    ]


def _map_voxels(image: SpatialImage, name: str) -> NDArray[Any]:
    """Return the voxels of `image`, scaled as `read_maps` tells."""
    proxy = image.dataobj
    # Not of its subclasses, whose slopes may be arrays.
    if type(proxy) is ArrayProxy and proxy.dtype.kind in "iu" and proxy.dtype.itemsize <= 2:
        with _voxel_errors(name):
            stored = proxy.get_unscaled()
        return _scaled(stored, proxy.slope, proxy.inter)
    return real_voxels(image, name)


def _scaled(stored: NDArray[Any], slope: float, inter: float) -> NDArray[Any]:
    """Return ``stored * slope + inter`` as `read_maps` tells."""
    is_narrow = stored.dtype.kind in "iu" and stored.dtype.itemsize <= 2
    if (slope, inter) == (1, 0) or not is_narrow or not _single_holds_steps(slope, inter):
        return apply_read_scaling(stored, slope, inter)
    scaled = stored.astype(np.float32)
    scaled *= np.float32(slope)
    if inter != 0:
        scaled += np.float32(inter)
    return scaled


def _single_holds_steps(slope: float, inter: float) -> bool:
    """Return whether float32 tells 16-bit integers of this scaling apart, with bits to spare."""
    step, most_steps = abs(slope), 2**16
    is_normal = _SINGLE_TINY <= step <= _SINGLE_MAX / (2 * most_steps)
    return is_normal and abs(inter) <= most_steps * step

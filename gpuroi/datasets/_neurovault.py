"""NeuroVault's image of an auditory computation task: downloaded once, then read from the disk."""

import json
import logging
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from gpuroi.checks import shown
from gpuroi.datasets._download import UnusableAnswerError, insist, only_writer, receive
from gpuroi.errors import InvalidMapError, MissingExtraError

SERVER = "https://neurovault.org"
_IMAGE_ID = 32980
_DESCRIPTION = (
    f"NeuroVault image {_IMAGE_ID} ({SERVER}/images/{_IMAGE_ID}/): the statistical map of the "
    "contrast between mental subtraction after spoken instructions and the baseline."
)
_logger = logging.getLogger("gpuroi.datasets")


@dataclass(frozen=True)
class NeuroVaultDataset:
    """A downloaded image; ``dataset.images`` and ``dataset["images"]`` are the same.

    Attributes
    ----------
    images : list of str
        The path of the image.
    images_meta : list of dict
        What NeuroVault says of the image, and its ``"absolute_path"``; without NeuroVault's part
        if the image was put there by hand.
    description : str
        What the image shows, in a sentence.

    Examples
    --------
    >>> from gpuroi.datasets import NeuroVaultDataset
    >>> dataset = NeuroVaultDataset(["map.nii.gz"], [{"id": 32980}], "A map.")
    >>> dataset.images == dataset["images"]
    True
    """

    images: list[str]
    images_meta: list[dict[str, Any]]
    description: str

    def keys(self) -> list[str]:
        """Return the names of the fields, so that ``dict(dataset)`` works.

        Returns
        -------
        list of str
        """
        return [field.name for field in fields(self)]

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)


def fetch_neurovault_auditory_computation_task(
    data_dir: str | os.PathLike[str] | None = None, verbose: int = 1, timeout: float = 10.0
) -> NeuroVaultDataset:
    """Return the map of nilearn's region-extraction example, downloaded on the first call.

    A drop-in for nilearn's function of the same name: NeuroVault image 32980, mental subtraction
    after spoken instructions. An interrupted download is taken up where it ended, by the same call
    or a later one; an image that is there and whole costs no request; a damaged one is downloaded
    again. The image appears under its name only once it has been read whole and its checksum is
    right. Processes that call at the same time wait for the first one (where the file system has
    locks; elsewhere each downloads for itself). nilearn's ``collections_meta`` is not fetched.

    Parameters
    ----------
    data_dir : path or None
        The folder for downloads; the image becomes ``neurovault/image_32980.nii.gz`` in it. None
        takes the environment variable ``GPUROI_DATA``, or else ``pooch.os_cache("gpuroi")``.
    verbose : int
        Above 0, the logger ``gpuroi.datasets`` tells of downloads at level INFO, else at DEBUG.
    timeout : float
        Seconds to wait for a connection, and for each next piece of an answer.

    Returns
    -------
    NeuroVaultDataset
        Its ``images[0]`` is the path.

    Raises
    ------
    DownloadError
        If there is no network, the server refuses or what it sends is no whole NIfTI image, three
        times in a row (once where the server says that there is nothing). It is an `OSError`.
    MissingExtraError
        If something has to be downloaded and pooch is not installed.
    ValueError, TypeError
        If `timeout` is no number above zero, or `data_dir` no path.

    Examples
    --------
    Without a network, a copy of the image that is put there by hand will do (here it is another
    one, to have something to copy):

    >>> import shutil, tempfile
    >>> from pathlib import Path
    >>> from gpuroi import datasets
    >>> with tempfile.TemporaryDirectory() as data_dir:
    ...     path = Path(data_dir, "neurovault", "image_32980.nii.gz")
    ...     path.parent.mkdir()
    ...     _ = shutil.copy(datasets.load_sample_motor_activation_image(), path)
    ...     dataset = datasets.fetch_neurovault_auditory_computation_task(data_dir)
    ...     dataset.images[0] == str(path)
    True
    """
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout={shown(timeout)}: expected seconds above zero.")
    path = _data_dir(data_dir) / "neurovault" / f"image_{_IMAGE_ID}.nii.gz"
    if not _is_whole(path):
        _need_extra(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with only_writer(path) as part:
            if not _is_whole(path):  # nobody brought it while this one waited
                _download(path, part, timeout, logging.INFO if verbose > 0 else logging.DEBUG)
    return NeuroVaultDataset([str(path)], [_metadata(path)], _DESCRIPTION)


def _data_dir(data_dir: str | os.PathLike[str] | None) -> Path:
    chosen = data_dir or os.environ.get("GPUROI_DATA")
    if not chosen:
        _need_extra(None)
        import pooch

        chosen = pooch.os_cache("gpuroi")
    return Path(chosen).expanduser().absolute()


def _need_extra(path: Path | None) -> None:
    """Raise `MissingExtraError` unless what downloads need is installed."""
    try:
        import pooch  # noqa: F401
        import requests  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"downloads need pooch ({error}); pip install 'gpuroi[datasets]', or put a copy of "
            f"NeuroVault's image {_IMAGE_ID} at "
            f"{path or f'$GPUROI_DATA/neurovault/image_{_IMAGE_ID}.nii.gz'}."
        ) from error


def _download(path: Path, part: Path, timeout: float, level: int) -> None:
    """Bring the image to `path`, by way of `part`, and what NeuroVault says of it beside it."""
    from gpuroi import io  # loads nibabel

    advice = (
        "Try again later, take load_sample_motor_activation_image(), which needs no network, or "
        f"put a copy of NeuroVault's image {_IMAGE_ID} at {path}."
    )
    about_url = f"{SERVER}/api/images/{_IMAGE_ID}/?format=json"
    _logger.log(level, "asking %s", about_url)
    metadata = insist(lambda: _fetch_metadata(about_url, timeout), about_url, advice)
    io.write_text(json.dumps(metadata, indent=2), _metadata_path(path))
    url = urljoin(about_url, metadata["file"])
    _logger.log(level, "downloading %s to %s", url, path)
    insist(lambda: receive(url, part, path, timeout, _check), url, advice)
    _logger.log(level, "downloaded %s (%d bytes)", path, path.stat().st_size)


def _fetch_metadata(url: str, timeout: float) -> dict[str, Any]:
    """Return what NeuroVault's API says of the image; its ``"file"`` is a URL."""
    import requests

    with requests.get(url, timeout=timeout) as response:
        response.raise_for_status()
        metadata = response.json()
    if not isinstance(metadata, dict) or not isinstance(metadata.get("file"), str):
        raise UnusableAnswerError(
            f'expected a JSON object whose "file" is a URL, found {shown(metadata)}'
        )
    return metadata


def _metadata(path: Path) -> dict[str, Any]:
    """Return what is known of the image at `path`, without a request."""
    try:
        saved = json.loads(_metadata_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the image was put there by hand
        saved = {"id": _IMAGE_ID}
    return {**saved, "absolute_path": str(path)}


def _metadata_path(path: Path) -> Path:
    return path.with_name(f"image_{_IMAGE_ID}.json")


def _is_whole(path: Path) -> bool:
    try:
        _check(path)
    except InvalidMapError:
        return False
    return True


def _check(path: Path) -> None:
    """Raise `InvalidMapError` unless there is a whole compressed NIfTI image at `path`."""
    from gpuroi import io

    io.load(path)
    with path.open("rb") as stream:
        if stream.read(2) != b"\x1f\x8b":
            raise InvalidMapError(f"{path}: expected a .nii.gz file, found one without the gz.")

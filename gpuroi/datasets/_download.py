"""Files from a server that may fail: taken up where they ended, in place only when whole."""

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from gpuroi.errors import DownloadError, InvalidMapError

T = TypeVar("T")

ATTEMPTS = 3
FIRST_PAUSE_S = 0.5  # doubled after each attempt
_BLOCK_BYTES = 1 << 14
# Too slow; a range that is not (or no longer) in the file; too often.
_PASSING_REFUSALS = (408, 416, 429)


class UnusableAnswerError(Exception):
    """An answer of the server that the next attempt may not get."""


@contextmanager
def only_writer(path: Path) -> Iterator[Path]:
    """Wait until nobody else downloads `path`; the value is the file to download into."""
    with path.with_name(f".{path.name}.lock").open("wb") as stream:
        if _lock(stream):
            yield path.with_name(f"part-{path.name}")  # stays, for a later call to go on from
            return
        part = path.with_name(f".part-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
        try:
            yield part
        finally:
            _discard(part)


def _lock(stream: IO[bytes]) -> bool:
    """Wait for the lock on an open file, which ends with the process; False if there are none."""
    try:
        import fcntl

        fcntl.flock(stream, fcntl.LOCK_EX)
    except (ImportError, OSError):  # Windows; network folders without locks
        return False
    return True


def insist(attempt: Callable[[], T], url: str, advice: str) -> T:
    """Return what `attempt` returns; failures that may pass are followed by another attempt.

    Raises
    ------
    DownloadError
        If the server refuses, or the last attempt fails; `advice` is what to do then.
    """
    import requests
    from urllib3.exceptions import HTTPError as BrokenTransfer

    failures = (requests.RequestException, BrokenTransfer, UnusableAnswerError, InvalidMapError)
    tried = 1
    while True:
        try:
            return attempt()
        except failures as error:
            if tried == ATTEMPTS or _is_final(error):
                times = "once" if tried == 1 else f"{tried} times"
                raise DownloadError(
                    f"{url}: {str(error).rstrip('.')} (tried {times}). {advice}"
                ) from error
        time.sleep(FIRST_PAUSE_S * 2 ** (tried - 1))
        tried += 1


def _is_final(error: Exception) -> bool:
    """Return whether the server refused, rather than failed."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return 400 <= status < 500 and status not in _PASSING_REFUSALS


def receive(
    url: str, part: Path, path: Path, timeout: float, check: Callable[[Path], None]
) -> None:
    """Bring the file at `url` to `path`, going on from what `part` holds of it.

    `part` takes the name of `path` once `check` finds nothing to raise `InvalidMapError` for.
    """
    _receive_rest(url, part, timeout)
    try:
        check(part)
    except InvalidMapError:
        _discard(part)  # it is as long as it should be: nothing would make it whole
        raise
    part.replace(path)
    _discard(part)


def _receive_rest(url: str, part: Path, timeout: float) -> None:
    """Bring `part` to the whole length of the file at `url`.

    The server is asked for the rest only if the file is still the same (RFC 9110, 13.1.5); one
    that knows no ranges sends the file from its start.
    """
    # Not pooch's downloader: it starts from the first byte each time, and it decompresses what a
    # server declares to be gzip encoding, as some do for .nii.gz files.
    import requests

    held, validator = _held(url, part)
    headers = {"Accept-Encoding": "identity"}
    if held:
        headers |= {"Range": f"bytes={held}-", "If-Range": validator}
    with requests.get(url, headers=headers, timeout=timeout, stream=True) as response:
        status, found = response.status_code, response.headers.get("Content-Range", "no range")
        goes_on = status == 206 and _continues(response, held, validator)
        if status in (206, 416) and not goes_on:
            _discard(part)  # for the next attempt to ask for all of it
        response.raise_for_status()
        if status != 200 and not goes_on:
            raise UnusableAnswerError(
                f"asked for the file from byte {held} on, got status {status} with {found}"
            )
        with part.open("ab" if goes_on else "wb") as stream:
            if not goes_on:  # written only now that the part is empty
                state = {"url": url, "validator": _validator(response)}
                _state_path(part).write_text(json.dumps(state), encoding="utf-8")
            # urllib3 raises where fewer bytes come than were announced.
            for block in response.raw.stream(_BLOCK_BYTES, decode_content=False):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())


def _held(url: str, part: Path) -> tuple[int, str]:
    """Return how many bytes of `url` there are in `part`, and what tells their version."""
    try:
        state = json.loads(_state_path(part).read_text(encoding="utf-8"))
        n_bytes = part.stat().st_size
    except (OSError, ValueError):  # nothing there, or killed while the state was written
        return 0, ""
    if state["url"] != url or state["validator"] is None:
        return 0, ""
    return n_bytes, state["validator"]


def _continues(response: Any, held: int, validator: str) -> bool:
    """Return whether a partial answer is the rest of the same file."""
    content_range = response.headers.get("Content-Range", "")
    return (
        held > 0
        and content_range.startswith(f"bytes {held}-")
        and _validator(response) in (None, validator)
    )


def _validator(response: Any) -> str | None:
    """Return what changes with the file; weak entity tags do not for every byte."""
    tag, date = (response.headers.get(name) for name in ("ETag", "Last-Modified"))
    chosen: str | None = date if tag is None or tag.startswith("W/") else tag
    return chosen


def _state_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _state_path(part).unlink(missing_ok=True)

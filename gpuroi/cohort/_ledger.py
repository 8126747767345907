"""What has been done: one line a map, appended by one process, read back by the next run."""

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from filelock import FileLock, Timeout

_FOLDER = ".gpuroi"


@dataclass(frozen=True)
class Record:
    """What became of one map."""

    source: str  # absolute
    size: int  # bytes, -1 if there was no file
    mtime_ns: int
    parameters: str  # digest
    stem: str
    status: Literal["done", "failed"]
    outputs: dict[str, tuple[int, int]] = field(default_factory=dict)  # bytes and CRC-32, by name
    n_regions: int = 0
    error: str = ""  # class
    message: str = ""


class FolderInUseError(RuntimeError):
    """Another run writes to the folder."""


class Ledger:
    """The records of an output folder; those of other shards can be read, not added to."""

    def __init__(self, folder: Path, shard: tuple[int, int] | None) -> None:
        self.folder = folder
        name = "ledger" if shard is None else f"ledger-{shard[0]}of{shard[1]}"
        (folder / _FOLDER).mkdir(parents=True, exist_ok=True)
        self._path = folder / _FOLDER / f"{name}.jsonl"
        self._lock = FileLock(folder / _FOLDER / f"{name}.lock")
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> "Ledger":
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise FolderInUseError(
                f"{self.folder} is in use by another run; wait for it, or write to another folder."
            ) from error
        self._stream = self._path.open("ab")
        if self._stream.tell():
            with self._path.open("rb") as written:
                written.seek(-1, os.SEEK_END)
                if written.read() != b"\n":  # a run was killed in the middle of a line
                    self._stream.write(b"\n")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._stream is not None
        self._stream.close()
        self._lock.release()

    def add(self, record: Record) -> None:
        """Append `record`, whole or not at all."""
        assert self._stream is not None
        end = self._stream.tell()
        try:
            self._stream.write(json.dumps(asdict(record), sort_keys=True).encode() + b"\n")
            self._stream.flush()
        except OSError:
            os.ftruncate(self._stream.fileno(), end)
            raise

    def records(self) -> dict[str, Record]:
        """Return the newest record of each source, of all shards."""
        newest: dict[str, Record] = {}
        for path in sorted((self.folder / _FOLDER).glob("ledger*.jsonl")):
            newest |= {record.source: record for record in _read(path)}
        return newest

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep the other shards from summing up at the same time."""
        with FileLock(self.folder / _FOLDER / "summary.lock"):
            yield


def _read(path: Path) -> Iterator[Record]:
    for line in path.read_bytes().splitlines():
        try:
            fields: dict[str, Any] = json.loads(line)
            outputs = {name: (size, crc) for name, (size, crc) in fields.pop("outputs").items()}
            yield Record(**fields, outputs=outputs)
        except (ValueError, TypeError, KeyError):
            continue  # torn when a run was killed: that map is done again


def are_whole(folder: Path, outputs: dict[str, tuple[int, int]]) -> bool:
    """Return whether all files are there as they were written."""
    return bool(outputs) and all(
        fingerprint(folder / name) == wanted for name, wanted in outputs.items()
    )


def fingerprint(path: Path) -> tuple[int, int] | None:
    """Return a file's size and CRC-32, or None if it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return len(content), zlib.crc32(content)

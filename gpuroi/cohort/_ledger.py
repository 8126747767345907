"""What has been done: one line a map, appended by one process, read back by the next run."""

import contextlib
import errno
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, Any, Literal

from filelock import FileLock, Timeout

from gpuroi.errors import FolderInUseError, OutputChangedError, OutputError

#: Of an output folder, beside the results.
LEDGER_FOLDER = ".gpuroi"

# Given up on a disk that is full, so that there is room to say what did not fit.
_RESERVED_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class Record:
    """What became of one map.

    Attributes
    ----------
    source : str
        Absolute path of the map.
    size, mtime_ns : int
        Bytes and time of change of its file, -1 if there was none.
    parameters : str
        Digest of the parameters and of the version of gpuroi.
    stem : str
        What the names of its outputs begin with, below the output folder.
    status : {"done", "failed"}
    n_volumes, n_regions : int
        Volumes of a series, 1 of a map; regions of all volumes together.
    output_bytes, output_crc : int
        Of all outputs, one behind the other: their length and CRC-32.
    error, message : str
        Class and message of what went wrong.
    warnings : tuple of str
    written_ns : int
        When it was written down: of several records of a map, the last one holds.
    """

    source: str
    size: int
    mtime_ns: int
    parameters: str
    stem: str
    status: Literal["done", "failed"]
    n_volumes: int = 0
    n_regions: int = 0
    output_bytes: int = 0
    output_crc: int = 0
    error: str = ""
    message: str = ""
    warnings: tuple[str, ...] = ()
    written_ns: int = 0

    @property
    def is_missing(self) -> bool:
        """Whether the map failed because there was no such file, if only for a while."""
        return self.status == "failed" and self.size < 0


_FIELDS = tuple(field.name for field in fields(Record))


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn errors of a disk that is full or read-only, on which nothing else fares better either.

    Raises
    ------
    OutputError
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise OutputError(f"{folder} cannot be written to: {error.strerror}.") from error


class Ledger:
    """The records of an output folder; those of other shards can be read, not added to.

    On a disk that is full there is a reserve for what is still to be said.

    Attributes
    ----------
    records : dict
        The newest record of each source, this run's included.
    done : dict
        The newest record of each source with which it was done.
    owners : dict
        The newest record of each stem that is done: whose outputs are there, unless they have been
        removed since.
    run : tuple (Path, str)
        A file, and what is in it until the next run begins.
    unended : dict
        Stems of maps that an earlier run began, and was killed before their records were written;
        and when it began them, in ns.
    leftovers : set of str
        Those of them that are this run's to clean up: not of other shards.

    Parameters
    ----------
    folder : Path
    shard : tuple (i, n) or None
    refuse : callable, optional
        Called with the ledger when it has been read, and nothing else has been done.
    """

    def __init__(
        self,
        folder: Path,
        shard: tuple[int, int] | None,
        refuse: Callable[["Ledger"], None] = lambda ledger: None,
    ) -> None:
        self.folder = folder
        self._refuse = refuse
        self._n_shards = None if shard is None else shard[1]
        name = "ledger" if shard is None else f"ledger-{shard[0]}of{shard[1]}"
        (folder / LEDGER_FOLDER).mkdir(parents=True, exist_ok=True)
        self._path = folder / LEDGER_FOLDER / f"{name}.jsonl"
        self.run = (self._path.with_suffix(".run"), secrets.token_hex(8))
        self._lock = _lock(self._path)
        self._reserve = self._path.with_suffix(".reserve")
        self._stream: IO[bytes] | None = None
        self._begun: IO[bytes] | None = None
        self._latest_ns = 0
        self.records: dict[str, Record] = {}
        self.done: dict[str, Record] = {}
        self.owners: dict[str, Record] = {}
        self.unended: dict[str, int] = {}
        self.leftovers: set[str] = set()

    def __enter__(self) -> "Ledger":
        with _alone(self._path, self._kin()):
            self._lock.acquire(timeout=0)
            self._path.touch()
        try:
            self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _open(self) -> None:
        self.read()
        self._refuse(self)
        with self._summing_up():  # the outputs of this shard are not to change meanwhile
            _ended(self._path).unlink(missing_ok=True)
        kin = {path.with_suffix(".run") for path in self._kin()}
        for path in set(self._path.parent.glob("ledger*.run")) - kin:
            path.unlink(missing_ok=True)  # of shards of another number, which have ended
        run_file, run_id = self.run
        run_file.write_text(run_id)
        self._reserve.write_bytes(bytes(_RESERVED_BYTES))
        self._stream = self._path.open("ab", buffering=0)
        if self._stream.tell():
            with self._path.open("rb") as written:
                written.seek(-1, os.SEEK_END)
                if written.read() != b"\n":  # a run was killed in the middle of a line
                    self._stream.write(b"\n")
        self._find_unended()

    def __exit__(self, *_: object) -> None:
        for stream in (self._stream, self._begun):
            if stream is not None:
                stream.close()
        self.give_up_reserve()
        self._lock.release()

    def add(self, record: Record) -> None:
        """Append `record`, whole or not at all."""
        record = replace(record, written_ns=self._now())
        fields = {name: getattr(record, name) for name in _FIELDS}
        line = json.dumps(fields).encode() + b"\n"
        try:
            self._append(line)
        except OSError:
            self.give_up_reserve()
            self._append(line)
        self._take(record)

    def begin(self, stem: str) -> None:
        """Write down that a map begins to be worked on, and may leave files if this is the end."""
        assert self._begun is not None
        with contextlib.suppress(OSError):  # on a full disk nothing is left behind either
            line = json.dumps([stem, time.time_ns(), self._now()])
            self._begun.write(line.encode() + b"\n")

    def _now(self) -> int:
        # Clocks of other machines, which other shards ran on, may be ahead.
        self._latest_ns = max(time.time_ns(), self._latest_ns + 1)
        return self._latest_ns

    def _find_unended(self) -> None:
        """Find what was begun and has no record since; keep only that in the file."""
        ended_ns: dict[str, int] = {}
        for record in self.records.values():
            ended_ns[record.stem] = max(record.written_ns, ended_ns.get(record.stem, 0))
        path = self._path.with_suffix(".begun")
        for file in self._path.parent.glob("ledger*.begun"):
            for line in file.read_bytes().splitlines():
                with contextlib.suppress(ValueError):  # torn, before anything was begun
                    stem, begun_ns, place_ns = json.loads(line)
                    if place_ns > ended_ns.get(stem, 0):
                        self.unended[stem] = begun_ns
                        if file == path or self._n_shards is None:
                            self.leftovers.add(stem)
        self._begun = path.open("ab", buffering=0)

    def settle(self) -> None:
        """Forget the `leftovers`, which have been removed."""
        path = self._path.with_suffix(".begun")
        for file in self._path.parent.glob("ledger*.begun"):
            if file == path or self._n_shards is None:
                file.write_bytes(b"")
        self.leftovers.clear()

    def give_up_reserve(self) -> None:
        """Make the last room there is."""
        self._reserve.unlink(missing_ok=True)

    def _append(self, line: bytes) -> None:
        assert self._stream is not None
        end = self._stream.tell()
        try:
            self._stream.write(line)
        except OSError:
            os.ftruncate(self._stream.fileno(), end)
            raise

    def read(self) -> None:
        """Take the records of all shards from the disk."""
        for record in _latest_records(self._path.parent):
            self._take(record)

    def _take(self, record: Record) -> None:
        self._latest_ns = max(self._latest_ns, record.written_ns)
        if _is_newer(record, self.records.get(record.source)):
            self.records[record.source] = record
        if record.status == "done":
            for key, newest in ((record.source, self.done), (record.stem, self.owners)):
                if _is_newer(record, newest.get(key)):
                    newest[key] = record

    def sources(self) -> set[str]:
        """Return the maps whose outputs are there, as far as is known here."""
        return {
            owner.source
            for owner in self.owners.values()
            if self.records[owner.source].is_missing
            or (
                self.records[owner.source].stem == owner.stem
                and self.records[owner.source].status == "done"
            )
        }

    @contextlib.contextmanager
    def last_of_shards(self, work: str) -> Iterator[bool]:
        """Yield whether every other shard has ended; until the block ends, none of them sums up.

        `work` tells what the shards are of: one that has ended with other work has not ended.

        This one has ended for the others from here on, so that of two that end together, the second
        to come here sees the first ended.
        """
        with self._summing_up():
            _ended(self._path).write_text(work)
            is_last = all(_has_ended(path, work) for path in self._kin())
            if is_last:
                self.read()
            yield is_last

    def _summing_up(self) -> FileLock:
        return FileLock(self._path.with_name("summary.lock"))

    def _kin(self) -> list[Path]:
        """Return the ledgers of all shards, this one's included."""
        if self._n_shards is None:
            return [self._path]
        numbers = range(1, self._n_shards + 1)
        return [self._path.with_name(f"ledger-{i}of{self._n_shards}.jsonl") for i in numbers]


@contextlib.contextmanager
def unchanged(folder: Path, records: Iterable[Record]) -> Iterator[None]:
    """Let no run begin in `folder` during the block, in which `records` are still the newest.

    Raises
    ------
    FolderInUseError
        If a run is under way.
    OutputChangedError
        If another run has worked on these maps since.
    """
    ledger = folder / LEDGER_FOLDER / "ledger.jsonl"
    with contextlib.ExitStack() as stack:
        with _alone(ledger, kin=[ledger]):
            stack.enter_context(_lock(ledger).acquire(timeout=0))
        newest: dict[str, Record] = {}
        for record in _latest_records(ledger.parent):
            if _is_newer(record, newest.get(record.source)):
                newest[record.source] = record
        if any(newest.get(record.source) != record for record in records):
            raise OutputChangedError(f"another run has worked on maps of {folder} since.")
        yield


@contextlib.contextmanager
def _alone(ledger: Path, kin: list[Path]) -> Iterator[None]:
    """Let no run begin during the block, in which only those of `kin` are under way.

    Raises
    ------
    FolderInUseError
        If another one is, or if the block finds the lock of `ledger` taken.
    """
    with FileLock(ledger.with_name("gate.lock")):
        try:
            if any(map(_is_locked, set(ledger.parent.glob("ledger*.jsonl")) - set(kin))):
                raise Timeout(os.fspath(ledger))
            yield
        except Timeout as error:
            raise FolderInUseError(
                f"{ledger.parent.parent} is in use by another run; wait for it, or write to "
                "another folder. (Only shards i/n of the same n may share one at the same time.)"
            ) from error


def _ended(ledger: Path) -> Path:
    return ledger.with_suffix(".ended")


def _has_ended(ledger: Path, work: str) -> bool:
    path = _ended(ledger)
    return path.is_file() and path.read_text() == work


def _lock(ledger: Path) -> FileLock:
    return FileLock(ledger.with_suffix(".lock"))


def _is_locked(ledger: Path) -> bool:
    lock = _lock(ledger)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def _latest_records(folder: Path) -> Iterator[Record]:
    """Yield, of each ledger of `folder`, how each map was done and failed last by each name."""
    for path in folder.glob("ledger*.jsonl"):
        latest = {(record.source, record.status, record.stem): record for record in _read(path)}
        yield from latest.values()


def _is_newer(record: Record, known: Record | None) -> bool:
    return known is None or known.written_ns <= record.written_ns


def _read(path: Path) -> Iterator[Record]:
    with path.open("rb") as lines:
        for line in lines:
            try:
                record: dict[str, Any] = json.loads(line)
                record["warnings"] = tuple(record["warnings"])
                yield Record(**record)
            except (ValueError, TypeError, KeyError):
                continue  # torn when a run was killed: that map is done again

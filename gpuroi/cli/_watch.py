"""What the command line says while maps are worked on: how far it is, and what goes wrong."""

import builtins
import os
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuroi.cli._screen import say, with_options
from gpuroi.words import counted

if TYPE_CHECKING:
    from rich.console import Console

    from gpuroi.cohort import CohortReport, Progress
    from gpuroi.cohort._ledger import Record

# Of more failures, or warnings, a person no longer reads what scrolls past.
_MOST_TOLD = 20

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_DRAWINGS = 0.1

# Errors whose messages say by themselves what was wrong.
_FORESEEN = (ValueError, OSError, MemoryError, RuntimeError)


class Watch:
    """Is told of each map as it ends; shows a bar on a terminal, and now and then a line elsewhere.

    Attributes
    ----------
    has_begun : bool
        Whether the maps have been found, and the first of them may be worked on.
    n_warnings : int
    """

    def __init__(self, console: "Console") -> None:
        self._console = console
        self._bar: Any = None
        self._looking: Any = None
        self._since = self._next = 0.0
        self._n_before = self._n_total = 0
        self._n_failures = 0
        self._told: set[str] = set()
        self.n_warnings = 0
        self.has_begun = False
        self._warnings: Any = warnings.catch_warnings(action="always", category=UserWarning)

    def __enter__(self) -> "Watch":
        self._warnings.__enter__()
        warnings.showwarning = self._warned
        if self._console.is_terminal:
            self._looking = self._console.status("looking for maps, and for what is done already")
            self._looking.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._warnings.__exit__()
        for shown in (self._looking, self._bar):
            if shown is not None:
                shown.stop()

    def __call__(self, progress: "Progress") -> None:
        """Take in how far the run is, and the map that has just ended."""
        if progress.latest is None:
            self._begin(progress)
            return
        self.tell(progress.latest)
        n_ended = progress.n_skipped + progress.n_done + progress.n_failed
        now = time.monotonic()
        if now < self._next and n_ended < self._n_total:
            return
        if self._bar is not None:
            self._next = now + _SECONDS_BETWEEN_DRAWINGS
            said = self._said(n_ended, progress.n_failed, now)
            self._bar.update(self._bar.task_ids[0], completed=n_ended, description=said)
        elif not self._console.is_terminal and now >= self._next:
            self._next = now + _SECONDS_BETWEEN_LINES
            self._console.print(self._said(n_ended, progress.n_failed, now), soft_wrap=True)

    def tell(self, record: "Record") -> None:
        """Say what was wrong with a map, if anything, and if not too much has been said."""
        for warning in record.warnings:
            self.n_warnings += 1
            self._say("warning", _named(with_options(warning), record), "yellow", self.n_warnings)
        if record.status == "failed":
            self._n_failures += 1
            reason = _named(with_options(_reason(record)), record)
            self._say("failed", reason, "bold red", self._n_failures)
        if record.warnings or record.status == "failed":
            self._told.add(record.source)

    def _warned(self, message: Warning | str, *_: object, **__: object) -> None:
        """Say what Python warns of in this very process."""
        self.n_warnings += 1
        self._say("warning", with_options(str(message)), "yellow", self.n_warnings)

    def tell_of_before(self, cohort: "CohortReport") -> None:
        """Say what was wrong with maps that ended in an earlier run, and were left alone."""
        for record in cohort.records:
            if record.source not in self._told:
                self.tell(record)

    def _begin(self, progress: "Progress") -> None:
        if self._looking is not None:
            self._looking.stop()
        self.has_begun = True
        self._n_before = progress.n_skipped + progress.n_failed
        self._n_total = self._n_before + progress.n_to_do
        self._since = time.monotonic()
        if progress.n_skipped:
            self._console.print(_done_already(progress.n_skipped, self._n_total), soft_wrap=True)
        if progress.n_failed:
            them = "it" if progress.n_failed == 1 else "them"
            self._console.print(
                f"{counted(progress.n_failed, 'map')} failed before and did not change since; "
                f"--retry-failed tries {them} again.",
                soft_wrap=True,
            )
        if not self._console.is_terminal:
            self._next = self._since + _SECONDS_BETWEEN_LINES
        elif self._n_total > 1 and progress.n_to_do:
            from rich.progress import BarColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                BarColumn(20), "{task.description}", console=self._console, transient=True
            )
            said = f"{self._n_before:,} of {counted(self._n_total, 'map')}"
            self._bar.add_task(said, total=self._n_total, completed=self._n_before)
            self._bar.start()

    def _said(self, n_ended: int, n_failed: int, now: float) -> str:
        """Return how far the run is, how fast, and how long it may still take."""
        said = f"{n_ended:,} of {counted(self._n_total, 'map')}"
        if n_failed:
            said += f", {n_failed:,} failed"
        if n_ended == self._n_total:
            return f"{said}; summing up"
        rate = (n_ended - self._n_before) / max(now - self._since, 1e-3)  # a second
        return f"{said}, {_speed(rate)}, {duration((self._n_total - n_ended) / rate)} left"

    def _say(self, word: str, message: str, style: str, number: int) -> None:
        if number <= _MOST_TOLD:
            say(self._console, word, message, style)
        elif number == _MOST_TOLD + 1:
            say(self._console, word, "one more; from here on they are only counted.", style)


def outcome(cohort: "CohortReport", seconds: float, n_warnings: int) -> str:
    """Return what became of all maps, and where the files about them are, as one sentence."""
    if not cohort.maps:
        return "There is no map for this shard."
    n_done, n_skipped = cohort.n_done + cohort.n_skipped, cohort.n_skipped
    before = ""
    if n_skipped:
        before = f" ({'all' if n_skipped == n_done else f'{n_skipped:,}'} of them before)"
    parts = [f"{n_done:,} done{before}"]
    if cohort.failures:
        parts.append(f"{len(cohort.failures):,} failed{_in_file(cohort, 'failures')}")
    n_regions = sum(record.n_regions for record in cohort.records)
    parts.append(f"{counted(n_regions, 'region')}{_in_file(cohort, 'regions')}")
    if n_warnings > _MOST_TOLD:
        parts.append(f"{n_warnings:,} warnings ({cohort.folder / '.gpuroi'})")
    parts.append(duration(seconds))
    said = f"{counted(len(cohort.maps), 'map')}: {', '.join(parts)}"
    if not cohort.summary:
        said += "; the summaries wait until the other shards of these maps have ended"
    return said


def _in_file(cohort: "CohortReport", kind: str) -> str:
    path = cohort.summary.get(kind)
    return "" if path is None else f" ({cohort.folder / path.name})"


def duration(seconds: float) -> str:
    """Return a time as a person would say it: 12 s, 3 min, 2 h 5 min."""
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60:,} h {minutes % 60} min"


def _speed(rate: float) -> str:
    if rate < 1:
        return f"{60 * rate:.1f} maps/min"
    return f"{rate:.1f} maps/s" if rate < 10 else f"{rate:,.0f} maps/s"


def _done_already(n_done: int, n_total: int) -> str:
    if n_done < n_total:
        return (
            f"{n_done:,} of {counted(n_total, 'map')} {'are' if n_done > 1 else 'is'} done already."
        )
    return "The map is done already." if n_total == 1 else f"All {n_total:,} maps are done already."


def _reason(record: "Record") -> str:
    """Return the message of an error; its class too, of one that nobody foresaw."""
    kind = getattr(builtins, record.error, ValueError)  # others have messages of their own
    if record.message and issubclass(kind, _FORESEEN):
        return record.message
    return f"{record.error}: {record.message}".removesuffix(": ")


def _named(message: str, record: "Record") -> str:
    """Return `message` with the path of the map, if it does not name it."""
    path = Path(record.source)
    if path.name in message:
        return message
    here = Path.cwd()
    shown = path.relative_to(here) if path.is_relative_to(here) else path
    return f"{os.fspath(shown)}: {message}"

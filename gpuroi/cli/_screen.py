"""What the command line shows: words, tables, and the report of a run."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from gpuroi.words import cutoff_of, smallest_region, threshold_asked, what_was_found

if TYPE_CHECKING:
    from rich.console import Console

    from gpuroi.cohort import CohortReport
    from gpuroi.result import Regions
    from gpuroi.types import Provenance

# Of how many maps the tables are shown, and of how many a line each; there is a report of as many
# unless one is asked for.
_MOST_TABLES = 8
_MOST_LINES = 50

# How many rows of a table are shown.
_MOST_ROWS = 40

# Columns of a terminal that a table needs.
_WIDTH = 80


def console(*, stderr: bool = False) -> "Console":
    """Return a console that prints text as it is: brackets in file names are no markup.

    It falls silent when nobody reads any more, as behind ``| head``; the work goes on.
    """
    from rich.console import Console

    class Patient(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True
            with suppress(OSError):  # not a file, as in tests
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    return Patient(stderr=stderr, markup=False, emoji=False, highlight=False)


def say(console: "Console", word: str, message: str, style: str) -> None:
    """Print `message` after a coloured `word`, without breaking lines."""
    from rich.text import Text

    console.print(Text.assemble((f"{word}: ", style), message), soft_wrap=True)


# What the library calls an option in its messages: where a message, or a part of it, begins, and
# not in names of files.
_PARAMETER = re.compile(
    r"(?:^|(?<=; )|(?<=pass )|(?<=with )|(?<=for )|(?<=\())"
    r"(threshold|tail|population|method|connectivity|min_region_size|smoothing_fwhm|seed_distance"
    r"|backend|jobs|batch_size|limit|on_gpu_error|mask_img)"
    r"(?:='([^']*)'(?!/)|=(?!\S*[/:])|(?:(?<=mask_img)|(?<=population)) )"
)


def with_options(message: str) -> str:
    """Return a message of the library with options in the place of Python's parameters."""

    def option(match: re.Match[str]) -> str:
        name = match[1].removesuffix("_img").replace("_", "-")
        return f"--{name} {match[2] or ''}"

    message = message.replace("resample_mask=True (--resample-mask)", "--resample-mask")
    return _PARAMETER.sub(option, message)


class Results:
    """What a run has left on disk, whichever run wrote it: shown, and made into a report.

    Whatever goes wrong with that is said, and costs nothing else: the results are complete.
    """

    def __init__(self, cohort: "CohortReport", screen: "Console", errors: "Console") -> None:
        self._cohort = cohort
        self._screen, self._errors = screen, errors
        self._n_maps = max(
            len(cohort.maps), sum(record.n_volumes for record in cohort.records)
        )  # volumes of a series are maps, too
        self.are_shown = True

    def show(self) -> None:
        """Print a table for each of few maps, a line for each of some, nothing of many."""
        from gpuroi.cohort._results import done_maps, labels_path, read_results
        from gpuroi.saved import provenance_of

        with self._kept_apart("tables cannot be shown"):
            if self._n_maps <= _MOST_TABLES:
                for prefix, regions, *_ in read_results(self._cohort):
                    _show_line(self._screen, regions.provenance, labels_path(prefix))
                    if len(regions):
                        _show_table(self._screen, regions, labels_path(prefix))
            elif self._n_maps <= _MOST_LINES:
                for _, prefixes in done_maps(self._cohort):
                    for prefix in prefixes:
                        _show_line(self._screen, provenance_of(prefix), labels_path(prefix))

    def write_report(self, *, asked: bool | None) -> None:
        """Write the page if it is asked for, or nothing is and there are few maps; say where."""
        from gpuroi.cohort import write_report

        if asked is None and self._n_maps > _MOST_LINES:
            self._screen.print(f"More than {_MOST_LINES} maps: --report writes a report, too.")
        elif asked or asked is None:
            with self._kept_apart("report could not be written"):
                path = write_report(self._cohort)
                self._screen.print(f"The report is {path}", soft_wrap=True)

    @contextmanager
    def _kept_apart(self, what: str) -> Iterator[None]:
        """Say of an error of the block, whatever it is, that `what`, and go on."""
        try:
            yield
        except Exception as error:
            self.are_shown = False
            reason = str(error) or type(error).__name__
            message = f"the {what} ({reason}); the results are complete."
            say(self._errors, "error", message, "bold red")


def _show_line(screen: "Console", provenance: "Provenance", path: Path) -> None:
    """Print what was found in a map, whose labels are at `path`, as one line."""
    from rich.text import Text

    how = f"(threshold {threshold_asked(provenance)}, {provenance['backend']})"
    heading = f": {what_was_found(provenance)} {how}"
    screen.print(Text.assemble((str(path), "bold"), heading), soft_wrap=True)
    if provenance["regions"] == 0:
        screen.print(f"  Nothing found; {_why_nothing(provenance)}", soft_wrap=True)


def _show_table(screen: "Console", regions: "Regions", path: Path) -> None:
    """Print the regions of a map as a table."""
    from rich.table import Table

    table = Table("label", "voxels", "mm³", "peak", "peak x y z (mm)", "mean", "at edge")
    for column in table.columns[:-1]:
        column.justify = "right"
    for row in regions.table.head(_MOST_ROWS).itertuples():
        table.add_row(
            str(row.label),
            str(row.voxels),
            f"{row.volume_mm3:.0f}",
            f"{row.peak_value:.2f}",
            f"{row.peak_x:.1f} {row.peak_y:.1f} {row.peak_z:.1f}",
            f"{row.mean_value:.2f}",
            "yes" if row.touches_edge else "",
        )
    # Digits that are cut off would be wrong ones: on a narrow terminal, lines go on below.
    screen.width = max(screen.width, _WIDTH)
    screen.print(table)
    if len(regions) > _MOST_ROWS:
        table_name = path.name.removesuffix(".nii.gz") + ".tsv"
        screen.print(f"  … and {len(regions) - _MOST_ROWS} more in {table_name}", soft_wrap=True)


def _why_nothing(provenance: "Provenance") -> str:
    """Return what a person may want to change where no region was found."""
    highest, cutoff = provenance["largest_magnitude"], cutoff_of(provenance)
    asked = provenance["parameters"]
    where = "" if asked["tail"] == "both" else " of this sign"
    where += "" if asked["mask_img"] is None else " in the mask"
    if highest > 0 and highest == provenance["percentile_score"]:
        return "the strongest voxels tie with the percentile, and none is above it."
    if highest >= cutoff and provenance["min_voxels"] > 1:
        doubt = " if there are any" if where else ""
        return (
            f"voxels{where} at the cut-off{doubt} fill no region of {smallest_region(provenance)} "
            "(--min-region-size)."
        )
    if highest >= cutoff:
        return f"no voxel{where} reaches the cut-off."
    if highest == 0:
        return "all voxels are zero, NaN or infinite."
    said = f"the largest magnitude is {highest:.6g}."
    if highest < cutoff and not threshold_asked(provenance).endswith("%"):
        said += " A percentile needs its percent sign: 97%."
    return said

"""What the command line shows: words, tables, a progress bar, and the report of a run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from gpuroi.recipe import Recipe
    from gpuroi.report import Report
    from gpuroi.result import Regions

# More rows than these, a person no longer reads.
_MOST_ROWS = 40

# Of more maps there is a report only when it is asked for.
_MOST_REPORTED = 50


def console(*, stderr: bool = False) -> "Console":
    """Return a console that prints text as it is: brackets in file names are no markup."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def say(console: "Console", word: str, message: str, style: str) -> None:
    """Print `message` after a coloured `word`, without breaking lines."""
    from rich.text import Text

    console.print(Text(f"{word}: ", style).append(message, "default"), soft_wrap=True)


@contextmanager
def progress(console: "Console", total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on a terminal when there is more than one map; yield what advances it."""
    if total < 2 or not console.is_terminal:
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("maps", total=total)
        yield lambda: progress.advance(task)


def show(screen: "Console", regions: "Regions", path: Path, *, as_table: bool) -> None:
    """Print the regions of one map as a table, or as one line."""
    from rich.table import Table
    from rich.text import Text

    asked = regions.provenance["parameters"]
    reach = {"both": "|value| ≥ ", "positive": "value ≥ ", "negative": "value ≤ -"}[asked["tail"]]
    heading = (
        f": {len(regions)} regions of at least {asked['min_region_size_mm3']:g} mm³ at "
        f"{reach}{regions.cutoff:.6g} (threshold {asked['threshold']}, "
        f"{regions.provenance['backend']})"
    )
    screen.print(Text(str(path), "bold").append(heading, "default"), soft_wrap=True)
    if len(regions) == 0:
        screen.print(f"  Nothing found; {_why_nothing(regions)}", soft_wrap=True)
    if not as_table or len(regions) == 0:
        return
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
    screen.print(table)
    if len(regions) > _MOST_ROWS:
        table_name = path.name.removesuffix(".nii.gz") + ".tsv"
        screen.print(f"  … and {len(regions) - _MOST_ROWS} more in {table_name}", soft_wrap=True)


def _why_nothing(regions: "Regions") -> str:
    """Return what a person may want to change where no region was found."""
    asked, highest = regions.provenance["parameters"], regions.provenance["largest_magnitude"]
    if highest >= regions.cutoff and regions.provenance["min_voxels"] > 1:
        smallest = f"{asked['min_region_size_mm3']:g} mm³"
        return f"no region of voxels at the cut-off fills {smallest} (--min-region-size)."
    said = f"the largest magnitude is {highest:.6g}."
    if highest < regions.cutoff and not asked["threshold"].endswith("%"):
        said += " A percentile needs its percent sign: 97%."
    return said


class Pages:
    """The report of a run, if there is to be one: what goes wrong with it costs nothing else."""

    def __init__(
        self,
        output: Path,
        recipe: "Recipe",
        *,
        asked: bool | None,
        n_sources: int,
        screen: "Console",
        errors: "Console",
    ) -> None:
        self._asked, self._screen, self._errors = asked, screen, errors
        self._folder = output
        self._report: Report | None = None
        self._error: Exception | None = None
        if asked or (asked is None and n_sources <= _MOST_REPORTED):
            with self._kept_apart():
                from gpuroi import report

                self._report = report.Report(output, recipe.describe())

    def add(self, regions: "Regions", path: Path, values: Any) -> None:
        """Take in the regions of a map, whose label image is at `path`."""
        if self._report is None:
            return
        if self._asked is None and len(self._report) == _MOST_REPORTED:
            self._report = None  # volumes of a series are maps, too
            return
        with self._kept_apart():
            self._report.add(regions, path, values)

    def fail(self, source: Path, error: Exception) -> None:
        """Take in a map that failed."""
        if self._report is not None:
            self._report.fail(str(source), str(error))

    def write(self) -> bool:
        """Write the page and say where it is; return whether all went well."""
        if self._report is not None:
            with self._kept_apart():
                self._report.write()
        if self._error is not None:
            reason = str(self._error) or type(self._error).__name__
            message = f"the report could not be written ({reason}); the results are complete."
            say(self._errors, "error", message, "bold red")
        elif self._report is not None:
            self._screen.print(f"The report is {self._folder / 'report.html'}", soft_wrap=True)
        elif self._asked is None:
            self._screen.print(f"More than {_MOST_REPORTED} maps: --report writes a report, too.")
        return self._error is None

    @contextmanager
    def _kept_apart(self) -> Iterator[None]:
        """Keep an error of the block, whatever it is, and end the report with it."""
        try:
            yield
        except Exception as error:  # no reason to lose a map, nor those that follow
            self._report, self._error = None, error

"""The command line: parse, call, print, exit code; the science is elsewhere.

Exit codes: 0 all maps done, 1 some maps failed, 2 the command itself cannot be carried out.
"""

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from gpuroi.backends import Backend
    from gpuroi.recipe import Recipe
    from gpuroi.report import Report
    from gpuroi.result import Regions

app = typer.Typer(
    help="Turn statistical brain maps into regions, on a GPU or a CPU, with identical labels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_EXTENSION = re.compile(r"\.(nii|img|hdr)(\.gz)?$|\.mg[hz]$", re.IGNORECASE)
_VOLUME = re.compile(r"_vol-\d{4,}$")

# Beyond these, a person no longer reads what scrolls past.
_MOST_TABLES = 8
_MOST_ROWS = 40

# Of more maps there is a report only when it is asked for.
_MOST_REPORTED = 50


def _print_version(wanted: bool) -> None:
    if wanted:
        from gpuroi import __version__

        typer.echo(f"gpuroi {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def extract(
    maps: Annotated[
        list[Path] | None,
        # An unreadable map is one failed map, not the end of the command.
        typer.Argument(metavar="MAP", readable=False, help="NIfTI files, 3-D or 4-D."),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            file_okay=False,
            writable=True,
            help="Folder to write to, made if missing; files of the same names are replaced.",
        ),
    ] = Path("regions-out"),
    sample: Annotated[
        bool, typer.Option("--sample", help="Add the sample map, a real one that nilearn brings.")
    ] = False,
    threshold: Annotated[
        str,
        typer.Option(help="A percentile such as '97%', or a magnitude in map units such as 3.0."),
    ] = "97%",
    min_region_size: Annotated[
        float, typer.Option(help="Smallest volume of a region, in mm^3.")
    ] = 1500.0,
    method: Annotated[
        str,
        typer.Option(help="connected_components, or local_regions (maxima and a random walker)."),
    ] = "connected_components",
    smoothing_fwhm: Annotated[
        float, typer.Option(help="local_regions: smoothing before seeds are found, in mm.")
    ] = 6.0,
    seed_distance: Annotated[
        int, typer.Option(help="local_regions: reach of the window of a seed, in voxels.")
    ] = 10,
    connectivity: Annotated[
        int,
        typer.Option(help="Neighbours that join: 6 (by faces), 18 (edges too), 26 (corners too)."),
    ] = 6,
    tail: Annotated[
        str,
        typer.Option(
            help="Signs that count: both (opposite ones never join), positive or negative."
        ),
    ] = "both",
    population: Annotated[
        str, typer.Option(help="Voxels that a percentile ranks: all, nonzero, or a mask image.")
    ] = "all",
    mask: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Mask image; voxels outside are background, and percentiles do not rank them.",
        ),
    ] = None,
    resample_mask: Annotated[
        bool,
        typer.Option(
            "--resample-mask", help="Bring masks onto the grid of the map (nearest neighbour)."
        ),
    ] = False,
    backend: Annotated[str, typer.Option(help="auto, cpu or cuda; see 'gpuroi devices'.")] = "auto",
    report: Annotated[
        bool | None,
        typer.Option(
            "--report/--no-report",
            help="Write OUT/report.html, a page to look through all results.",
            show_default="where there are at most 50 maps",
        ),
    ] = None,
) -> None:
    """Write the regions of each MAP: labels (.nii.gz), a table (.tsv) and provenance (.json).

    The files are named after the map: sub-01_tmap.nii.gz gives
    OUT/sub-01_tmap_desc-regions_dseg.nii.gz, .tsv and .json;
    volumes of a 4-D map have _vol-0000, _vol-0001, ... before _desc.

    OUT/report.html shows them; of two maps or more, OUT/overlap.nii.gz
    counts in how many each voxel lies in a region.

    Exit code: 0 all maps done, 1 some failed, 2 the command cannot be run.
    """
    from gpuroi.backends import get_backend
    from gpuroi.datasets import load_sample_motor_activation_image
    from gpuroi.recipe import make_recipe

    screen, errors = _console(), _console(stderr=True)
    with _usage_errors(errors):
        sources = list(maps or [])
        if sample:
            sources.append(Path(load_sample_motor_activation_image()))
        if not sources:
            raise ValueError("there is no map to work on; name a file, or pass --sample.")
        stems = _stems(sources)
        recipe = make_recipe(
            _number_or_text(threshold),
            tail=tail,
            population=population,
            mask_img=mask,
            method=method,
            connectivity=connectivity,
            min_region_size=min_region_size,
            smoothing_fwhm=smoothing_fwhm,
            seed_distance=seed_distance,
            resample_mask=resample_mask,
        )
        chosen = get_backend(backend)
        output = output.expanduser()
        output.mkdir(parents=True, exist_ok=True)

    pages = _Pages(
        output, recipe, asked=report, n_sources=len(sources), screen=screen, errors=errors
    )
    failed = 0
    with _progress(errors, len(sources)) as advance:
        for source, stem in zip(sources, stems, strict=True):
            try:
                results = _extract_one(source, output / stem, recipe, chosen, errors, pages)
            except (ValueError, OSError, MemoryError) as error:
                failed += 1
                named = str(error) if str(source) in str(error) else f"{source}: {error}"
                _say(errors, "failed", named, "bold red")
                pages.fail(source, error)
            except RuntimeError as error:
                pages.fail(source, error)
                if chosen.name != "cpu":  # the device may be lost; no other map would fare better
                    _say(errors, "error", f"{source}: {error}; nothing more was done.", "bold red")
                    pages.write()
                    raise typer.Exit(1) from error
                failed += 1
                _say(errors, "failed", f"{source}: {error}", "bold red")
            else:
                few = max(len(sources), len(results)) <= _MOST_TABLES
                for regions, path in results:
                    _show(screen, regions, path, as_table=few)
            advance()
    reported = pages.write()
    if failed:
        others = f"; the others are in {output}" if failed < len(sources) else ""
        errors.print(f"{failed} of {len(sources)} maps failed{others}.", soft_wrap=True)
    if failed or not reported:
        raise typer.Exit(1)


@app.command()
def devices() -> None:
    """Say which backends can run here, on what, and why the others cannot."""
    from rich.table import Table

    from gpuroi.backends import available_backends, get_backend

    table = Table("backend", "runs here", "device, or what is missing", "versions")
    for name, reason in available_backends().items():
        if reason is None:
            backend = get_backend(name)
            versions = "\n".join(f"{k} {v}" for k, v in backend.versions().items())
            table.add_row(name, "yes", backend.device, versions)
        else:
            table.add_row(name, "no", reason, "")
    screen = _console()
    screen.print(table)
    with _usage_errors(_console(stderr=True)):  # GPUROI_BACKEND may name one that cannot run
        screen.print(f"'auto' takes {get_backend().name}.")


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # "≥" and file names may not fit its encoding
    app(prog_name="gpuroi")


class _Pages:
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
            _say(self._errors, "error", message, "bold red")
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


def _extract_one(
    source: Path,
    prefix: Path,
    recipe: "Recipe",
    backend: "Backend",
    errors: "Console",
    pages: _Pages,
) -> list[tuple["Regions", Path]]:
    """Write the regions of every volume of `source`; return them with their label images."""
    from gpuroi import io
    from gpuroi.pipeline import extract_maps

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)  # others are for developers
        volumes = io.read_maps(source)
        results = []
        for number, regions in enumerate(extract_maps(volumes, recipe, backend)):
            volume = f"_vol-{number:04d}" if len(volumes) > 1 else ""
            paths = regions.save(f"{prefix}{volume}_desc-regions_dseg")
            results.append((regions, paths["labels"]))
            pages.add(regions, paths["labels"], volumes[number].data)
    for warning in caught:
        _say(errors, "warning", str(warning.message), "yellow")
    return results


def _stems(sources: list[Path]) -> list[str]:
    """Return the names of `sources` without extensions, which name the outputs."""
    first: dict[str, Path] = {}
    for source in sources:
        stem = _EXTENSION.sub("", source.name)
        if stem in first:
            raise ValueError(
                f"{first[stem]} and {source} would both write {stem}_desc-regions_dseg.nii.gz; "
                "extract them into separate folders."
            )
        first[stem] = source
    for stem, source in first.items():
        series = first.get(_VOLUME.sub("", stem), source)
        if series is not source:
            raise ValueError(
                f"a volume of {series} could be written as {stem}_desc-regions_dseg.nii.gz, as "
                f"{source} is; extract them into separate folders."
            )
    return list(first)


def _number_or_text(threshold: str) -> float | str:
    try:
        return float(threshold)
    except ValueError:
        return threshold


def _console(*, stderr: bool = False) -> "Console":
    """Return a console that prints text as it is: brackets in file names are no markup."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def _say(console: "Console", word: str, message: str, style: str) -> None:
    """Print `message` after a coloured `word`, without breaking lines."""
    from rich.text import Text

    console.print(Text(f"{word}: ", style).append(message, "default"), soft_wrap=True)


@contextmanager
def _usage_errors(errors: "Console") -> Iterator[None]:
    """Turn an error of the block into its message and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        _say(errors, "error", str(error), "bold red")
        raise typer.Exit(2) from error


@contextmanager
def _progress(console: "Console", total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on a terminal when there is more than one map; yield what advances it."""
    if total < 2 or not console.is_terminal:
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("maps", total=total)
        yield lambda: progress.advance(task)


def _show(screen: "Console", regions: "Regions", path: Path, *, as_table: bool) -> None:
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

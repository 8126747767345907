"""The command line: parse, call, print, exit code; the science is elsewhere.

Exit codes: 0 all maps done, 1 some maps failed, 2 the command itself cannot be carried out.
"""

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpuroi.screen import Pages, console, progress, say, show

if TYPE_CHECKING:
    from rich.console import Console

    from gpuroi.backends import Backend
    from gpuroi.recipe import Recipe
    from gpuroi.result import Regions

app = typer.Typer(
    help="Turn statistical brain maps into regions, on a GPU or a CPU, with identical labels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_EXTENSION = re.compile(r"\.(nii|img|hdr)(\.gz)?$|\.mg[hz]$", re.IGNORECASE)
_VOLUME = re.compile(r"_vol-\d{4,}$")

# Of more maps, a person no longer reads the tables that scroll past.
_MOST_TABLES = 8


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

    screen, errors = console(), console(stderr=True)
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

    pages = Pages(
        output, recipe, asked=report, n_sources=len(sources), screen=screen, errors=errors
    )
    failed = 0
    with progress(errors, len(sources)) as advance:
        for source, stem in zip(sources, stems, strict=True):
            try:
                results = _extract_one(source, output / stem, recipe, chosen, errors, pages)
            except Exception as error:  # whatever is wrong with one map, the others are done
                named = _named(error, source)
                pages.fail(source, error)
                if isinstance(error, RuntimeError) and chosen.name != "cpu":
                    # The device may be lost: no other map would fare better.
                    say(errors, "error", f"{named}; nothing more was done.", "bold red")
                    pages.write()
                    raise typer.Exit(1) from error
                failed += 1
                say(errors, "failed", named, "bold red")
            else:
                few = max(len(sources), len(results)) <= _MOST_TABLES
                for regions, path in results:
                    show(screen, regions, path, as_table=few)
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
    screen = console()
    screen.print(table)
    with _usage_errors(console(stderr=True)):  # GPUROI_BACKEND may name one that cannot run
        screen.print(f"'auto' takes {get_backend().name}.")


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # "≥" and file names may not fit its encoding
    app(prog_name="gpuroi")


def _extract_one(
    source: Path,
    prefix: Path,
    recipe: "Recipe",
    backend: "Backend",
    errors: "Console",
    pages: Pages,
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
        say(errors, "warning", str(warning.message), "yellow")
    return results


def _named(error: Exception, source: Path) -> str:
    """Return what went wrong with `source`; the class too, of an error that nobody foresaw."""
    message = str(error)
    if not isinstance(error, ValueError | OSError | MemoryError | RuntimeError):
        message = f"{type(error).__name__}: {message}"
    return message if str(source) in message else f"{source}: {message}"


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


@contextmanager
def _usage_errors(errors: "Console") -> Iterator[None]:
    """Turn an error of the block into its message and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        say(errors, "error", str(error), "bold red")
        raise typer.Exit(2) from error

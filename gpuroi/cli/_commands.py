"""The commands and their options: parse, call, print, exit code."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from gpuroi.checks import check_choice
from gpuroi.cli._screen import Results, console, say, with_options
from gpuroi.cli._watch import Watch, outcome

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    help="Turn statistical brain maps into regions, on a GPU or a CPU, with identical labels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Options that take as many labels as follow them, and what a label may begin with.
_LABEL_OPTIONS = {
    "--participant-label": "sub-",
    "--task": "task-",
    "--contrast": "contrast-",
    "--stat": "stat-",
}
_LABEL = re.compile(r"([a-z]+-)?[A-Za-z0-9+]+")


class _LabelsCommand(TyperCommand):
    """A command that reads ``--participant-label 01 02`` as BIDS Apps do."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_spread(args)))


def _spread(args: list[str]) -> Iterator[str]:
    """Yield `args` with each label behind an option of its own: Click's take one each."""
    option, has_label = "", False
    for arg in args:
        prefix = _LABEL_OPTIONS.get(option.replace("_", "-"))
        if arg.startswith("-"):
            option, equals, _ = arg.partition("=")
            has_label = bool(equals)
        elif prefix is None:
            pass
        elif not has_label:
            has_label = True
        elif not _LABEL.fullmatch(arg):
            option = ""
        elif not arg.startswith(prefix) and Path(arg).exists():
            raise typer.BadParameter(
                f"{arg} behind {option} may be a label or an input: write {prefix}{arg} for the "
                f"label, ./{arg} for the input."
            )
        else:
            yield option
        yield arg


# Groups of options in the help.
_WHICH, _HOW, _WHERE = "Which maps", "How", "Where it runs"


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


@app.command(
    cls=_LabelsCommand,
    help=(
        "Write the regions of each map: labels (.nii.gz), a table (.tsv) and provenance (.json)."
        "\n\n"
        "The files are named after the map: sub-01_tmap.nii.gz gives "
        "OUT/sub-01_tmap_desc-regions_dseg.nii.gz, .tsv and .json. Maps found in a folder keep "
        "the folders below it; files of one name in several folders keep those that tell them "
        "apart. Volumes of a 4-D map have _vol-0000, _vol-0001, ... before _desc."
        "\n\n"
        "Of two maps or more, OUT/regions.tsv is all tables in one, and OUT/overlap.nii.gz counts "
        "in how many maps each voxel lies in a region. OUT/failures.tsv lists the maps that "
        "failed. The same command once more goes on where it was stopped."
        "\n\n"
        "Exit code: 0 all maps done, 1 some failed or the run had to stop, 2 the command cannot "
        "be carried out, 130 interrupted."
    ),
    # --participant_label, as BIDS Apps have it, and all other options that way, too.
    context_settings={"token_normalize_func": lambda token: token.replace("_", "-")},
)
def extract(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT",
            help="NIfTI files (3-D or 4-D), folders, patterns, lists (@maps.txt), BIDS datasets.",
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            file_okay=False,
            help="Folder to write to, made if missing. Earlier results in it are replaced; maps, "
            "and summaries that gpuroi has not written, are not.",
        ),
    ] = Path("regions-out"),
    report: Annotated[
        bool | None,
        typer.Option(
            "--report/--no-report",
            help="Write OUT/report.html, a page to look through all results.",
            show_default="where there are at most 50 maps",
        ),
    ] = None,
    sample: Annotated[
        bool,
        typer.Option(
            "--sample",
            help="Add the sample map, a real one that nilearn brings.",
            rich_help_panel=_WHICH,
        ),
    ] = False,
    participant_label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            help="Only maps of these participants, by their BIDS names; with or without sub-. "
            "One label or several (01 02), as with the next three.",
            show_default=False,
            rich_help_panel=_WHICH,
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            help="Only maps of these tasks.",
            show_default=False,
            rich_help_panel=_WHICH,
        ),
    ] = None,
    contrast: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            help="Only maps of these contrasts.",
            show_default=False,
            rich_help_panel=_WHICH,
        ),
    ] = None,
    stat: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            help="Only maps of these statistics, such as t or z.",
            show_default=False,
            rich_help_panel=_WHICH,
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="i/n",
            help="Only every n-th map from the i-th on: 3/16 is the third of 16 tasks that share "
            "the maps.",
            rich_help_panel=_WHICH,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", help="Only the first N maps.", rich_help_panel=_WHICH),
    ] = None,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed",
            help="Also those that failed before and have not changed since.",
            rich_help_panel=_WHICH,
        ),
    ] = False,
    threshold: Annotated[
        str,
        typer.Option(
            help="A percentile such as '97%', or a magnitude in map units such as 3.0.",
            rich_help_panel=_HOW,
        ),
    ] = "97%",
    min_region_size: Annotated[
        float, typer.Option(help="Smallest volume of a region, in mm^3.", rich_help_panel=_HOW)
    ] = 1500.0,
    method: Annotated[
        str,
        typer.Option(
            help="connected_components, or local_regions (maxima and a random walker).",
            rich_help_panel=_HOW,
        ),
    ] = "connected_components",
    smoothing_fwhm: Annotated[
        float,
        typer.Option(
            help="local_regions: smoothing before seeds are found, in mm.", rich_help_panel=_HOW
        ),
    ] = 6.0,
    seed_distance: Annotated[
        int,
        typer.Option(
            help="local_regions: reach of the window of a seed, in voxels.", rich_help_panel=_HOW
        ),
    ] = 10,
    connectivity: Annotated[
        int,
        typer.Option(
            help="Neighbours that join: 6 (by faces), 18 (edges too), 26 (corners too).",
            rich_help_panel=_HOW,
        ),
    ] = 6,
    tail: Annotated[
        str,
        typer.Option(
            help="Signs that count: both (opposite ones never join), positive or negative.",
            rich_help_panel=_HOW,
        ),
    ] = "both",
    population: Annotated[
        str,
        typer.Option(
            help="Voxels that a percentile ranks: all, nonzero, or a mask image.",
            rich_help_panel=_HOW,
        ),
    ] = "all",
    mask: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Mask image; voxels outside are background, and percentiles do not rank them.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    resample_mask: Annotated[
        bool,
        typer.Option(
            "--resample-mask",
            help="Bring masks onto the grid of the map (nearest neighbour).",
            rich_help_panel=_HOW,
        ),
    ] = False,
    backend: Annotated[
        str,
        typer.Option(help="auto, cpu or cuda; see 'gpuroi devices'.", rich_help_panel=_WHERE),
    ] = "auto",
    jobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Processes.",
            show_default="one for each core",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    batch_size: Annotated[
        str,
        typer.Option(
            metavar="auto|N",
            help="Maps that are handed to a GPU, or to a worker of Dask, at once.",
            rich_help_panel=_WHERE,
        ),
    ] = "auto",
    on_gpu_error: Annotated[
        str,
        typer.Option(
            metavar="stop|cpu",
            help="Whether a GPU that fails ends the run, or the CPU does the rest.",
            rich_help_panel=_WHERE,
        ),
    ] = "stop",
    dask: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run on a Dask cluster: the address of its scheduler, or a scheduler file.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
) -> None:
    """Write the regions of maps; see the help above."""
    from gpuroi.cohort import extract_cohort
    from gpuroi.datasets import load_sample_motor_activation_image
    from gpuroi.recipe import make_recipe

    since = time.monotonic()
    screen, errors = console(), console(stderr=True)
    with _usage_errors(errors):
        sources = list(inputs or [])
        if sample:
            sources.append(str(load_sample_motor_activation_image()))
        if not sources:
            raise ValueError("there is no map to work on; name a file, or pass --sample.")
        if report and shard is not None:
            raise ValueError(
                "--report and --shard do not go together: each shard would replace the report of "
                "the others. Run once more without --shard when all are done."
            )
        if jobs is not None and dask is not None:
            raise ValueError(
                "--jobs and --dask do not go together: a Dask cluster has the workers it has."
            )
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
        run = partial(
            extract_cohort,
            sources,
            output,
            recipe,
            entities={
                "sub": participant_label or [],
                "task": task or [],
                "contrast": contrast or [],
                "stat": stat or [],
            },
            shard=_shard(shard),
            limit=limit,
            jobs=jobs,
            batch_size=_batch_size(batch_size),
            retry_failed=retry_failed,
            backend=backend,
            on_gpu_error=check_choice("on_gpu_error", on_gpu_error, ("stop", "cpu")),
        )

    watch = Watch(errors)
    with _endings(watch, errors), watch, _cluster(dask) as client:
        cohort = run(client=client, on_progress=watch)
    watch.tell_of_before(cohort)
    cohort = replace(cohort, folder=output.expanduser())  # as it was typed
    results = Results(cohort, screen, errors)
    results.show()
    results.write_report(asked=False if shard is not None else report)
    said = outcome(cohort, time.monotonic() - since, watch.n_warnings)
    errors.print(said, soft_wrap=True)
    if cohort.failures or not results.are_shown:
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


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None:
        raise ValueError(f"--shard {text!r} is not i/n; pass, say, 3/16 for the third of 16.")
    return int(match[1]), int(match[2])


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--batch-size {text!r} is neither auto nor a number of maps >= 1.")
    return int(text)


def _number_or_text(threshold: str) -> float | str:
    try:
        return threshold if "_" in threshold else float(threshold)  # 9_7 is Python's 97
    except ValueError:
        return threshold


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Connect to the scheduler of a Dask cluster for the block, if there is to be one."""
    if address is None:
        yield None
        return
    from gpuroi.errors import MissingExtraError

    try:
        from distributed import Client
    except ImportError as error:
        raise MissingExtraError(
            f"--dask needs distributed, which cannot be imported ({error}); "
            "pip install 'gpuroi[dask]'."
        ) from error
    path = Path(address).expanduser()
    is_file = path.is_file()
    if not is_file and ":" not in address:  # the client would wait for such a file for ever
        raise ValueError(
            f"--dask {address!r} is neither the address of a scheduler, such as "
            "tcp://10.0.0.1:8786, nor a scheduler file that exists."
        )
    connect: Any = Client
    with connect(scheduler_file=str(path)) if is_file else connect(address) as client:
        yield client


@contextmanager
def _usage_errors(errors: "Console") -> Iterator[None]:
    """Turn an error of the block into its message and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        say(errors, "error", with_options(str(error)), "bold red")
        raise typer.Exit(2) from error


@contextmanager
def _endings(watch: Watch, errors: "Console") -> Iterator[None]:
    """Turn what ends a run into its message and exit code.

    Until the maps are found and the first can be worked on, it is the command that is wrong; what
    comes later and is neither the device's nor the disk's fault is ours, and has a traceback.
    """
    from gpuroi.errors import OutputError

    try:
        yield
    except KeyboardInterrupt as interruption:
        errors.print("interrupted; run again to go on")
        raise typer.Exit(130) from interruption
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        if watch.has_begun and not isinstance(error, RuntimeError | OSError):
            raise
        message = with_options(str(error))
        if watch.has_begun and isinstance(error, OutputError):
            message += " What is done is kept; run again to go on."
        say(errors, "error", message, "bold red")
        raise typer.Exit(1 if watch.has_begun else 2) from error

"""A cohort from inputs to summaries."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gpuroi.cohort._discover import MapFile, find_maps
from gpuroi.cohort._distributed import run_on_dask
from gpuroi.cohort._ledger import Ledger, Record, are_whole
from gpuroi.cohort._one import Outcome, failed, identify, make_work
from gpuroi.cohort._summary import write_summary
from gpuroi.cohort._workers import WorkerDiedError, run_jobs
from gpuroi.recipe import Recipe, make_recipe

_BATCH = 16  # maps a process is given at once: hides the way to the parent and back
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+-[0-9a-f]{8}\.tmp")


@dataclass(frozen=True)
class CohortReport:
    """What became of a cohort."""

    folder: Path
    n_done: int  # in this run
    n_skipped: int  # done by an earlier one
    failures: tuple[Record, ...]
    warnings: tuple[str, ...] = ()
    summary: dict[str, Path] = field(default_factory=dict)


def extract_cohort(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    recipe: Recipe | Mapping[str, Any] | None = None,
    *,
    entities: Mapping[str, Sequence[str]] | None = None,
    shard: tuple[int, int] | None = None,
    limit: int | None = None,
    jobs: int | None = None,
    batch_size: int | None = None,
    retry_failed: bool = False,
    backend: str = "cpu",
    client: Any = None,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> CohortReport:
    """Write the regions of many maps, in processes, and go on where an earlier run was stopped.

    Parameters
    ----------
    inputs : path or paths
        Files, folders, patterns, lists (``"@maps.txt"``), BIDS datasets; see `find_maps`.
    out_dir : path
        For each map a label image, a table and a ``.json``, below the folders that the input has;
        ``regions.tsv``, ``overlap.nii.gz`` and ``failures.tsv`` of all; and the ledger.
    recipe : Recipe or mapping, optional
        Parameters of `gpuroi.extract_regions`, such as ``{"threshold": 3.0}``.
    entities, shard, limit
        Which of the maps; see `find_maps`.
    jobs : int, optional
        Processes; by default one for each core that may be used.
    batch_size : int, optional
        Maps that a process is given at once.
    retry_failed : bool
        Try again what failed before and has not changed since.
    backend : {"cpu", "cuda", "auto"}
        Where each process computes.
    client : distributed.Client, optional
        Run on the workers of a Dask cluster instead of `jobs` processes; all of them see the inputs
        and `out_dir` at the same paths.
    on_progress : callable, optional
        Called with the numbers of maps done, failed and to do in this run.

    Returns
    -------
    CohortReport

    Raises
    ------
    ValueError, TypeError
        If nothing is found, two maps would write to one place, or a parameter is wrong.
    FolderInUseError
        If another run writes to `out_dir`.

    Examples
    --------
    >>> import tempfile, nibabel as nib, numpy as np
    >>> from gpuroi.cohort import extract_cohort
    >>> folder = tempfile.mkdtemp()
    >>> data = np.zeros((8, 8, 8), np.float32)
    >>> data[1:4, 1:4, 1:4] = 5.0
    >>> nib.save(nib.Nifti1Image(data, np.eye(4)), folder + "/map.nii.gz")
    >>> report = extract_cohort(folder, folder + "/out", {"threshold": 3.0}, jobs=1)
    >>> report.n_done, len(report.failures)
    (1, 0)
    """
    if isinstance(inputs, str | os.PathLike):
        inputs = [inputs]
    chosen = recipe if isinstance(recipe, Recipe) else make_recipe(**(recipe or {}))
    parameters = digest(chosen)
    folder = Path(out_dir).expanduser().absolute()
    maps = [
        one
        for one in find_maps(inputs, entities=entities, shard=shard, limit=limit)
        if folder not in one.path.absolute().parents
    ]
    n_jobs = jobs or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else jobs or 1
    folder.mkdir(parents=True, exist_ok=True)
    with Ledger(folder, shard) as ledger:
        _remove_temporaries(folder, maps)
        todo, earlier_failures, n_skipped = _to_do(maps, ledger, parameters, retry_failed)
        n_done, failures = 0, list(earlier_failures)
        warnings: list[str] = []
        arguments = (folder, chosen, parameters, backend)
        size = batch_size or _BATCH
        if client is None:
            results = run_jobs(todo, min(n_jobs, max(1, len(todo))), size, make_work, arguments)
        else:
            results = run_on_dask(client, todo, size, make_work, arguments)
        for one, result in results:
            if isinstance(result, WorkerDiedError):
                result = Outcome(failed(one, parameters, result))
            ledger.add(result.record)
            warnings += result.warnings
            if result.record.status == "done":
                n_done += 1
            else:
                failures.append(result.record)
            if on_progress is not None:
                on_progress(n_done, len(failures), len(todo))
        _remove_temporaries(folder, maps)  # of processes that died in this run
        with ledger.alone():
            summary = write_summary(folder, ledger.records().values(), parameters)
    return CohortReport(folder, n_done, n_skipped, tuple(failures), tuple(warnings), summary)


def digest(recipe: Recipe) -> str:
    """Return what tells one set of parameters from another, the voxels of masks included."""
    from gpuroi import __version__

    content = hashlib.sha256(json.dumps([__version__, recipe.describe()]).encode())
    mask: Any
    for mask in (recipe.mask_img, recipe.population):
        if mask is not None and not isinstance(mask, str):
            content.update(np.ascontiguousarray(mask.dataobj).tobytes())
            content.update(np.ascontiguousarray(mask.affine).tobytes())
    return content.hexdigest()[:16]


def _to_do(
    maps: list[MapFile], ledger: Ledger, parameters: str, retry_failed: bool
) -> tuple[list[MapFile], list[Record], int]:
    """Return the maps to work on, the failures that stay, and how many are done already."""
    records = ledger.records()
    todo, failures, n_skipped = [], [], 0
    for one in maps:
        record = records.get(str(one.path.absolute()))
        is_same = record is not None and (
            (record.size, record.mtime_ns) == identify(one.path)
            and record.parameters == parameters
            and record.stem == str(one.stem)
        )
        if record is None or not is_same:
            todo.append(one)
        elif record.status == "failed":
            (todo.append(one) if retry_failed else failures.append(record))
        elif are_whole(ledger.folder, record.outputs):
            n_skipped += 1
        else:
            todo.append(one)
    return todo, failures, n_skipped


def _remove_temporaries(folder: Path, maps: list[MapFile]) -> None:
    """Remove what processes that were killed have left of these maps' files."""
    for parent in {folder / one.stem.parent for one in maps} | {folder}:
        if not parent.is_dir():
            continue
        stems = {one.stem.name for one in maps if folder / one.stem.parent == parent}
        for path in parent.iterdir():
            match = _TEMPORARY.fullmatch(path.name)
            if match and (parent == folder or any(match["name"].startswith(s) for s in stems)):
                path.unlink(missing_ok=True)

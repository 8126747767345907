"""A cohort from inputs to summaries."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, cycle
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np

from gpuroi.backends import Backend, environments, get_backend, names
from gpuroi.checks import at_least_one, check_choice
from gpuroi.cohort._cluster import Cluster
from gpuroi.cohort._conflicts import refuse_to_forget, refuse_to_replace
from gpuroi.cohort._consumer import Consumer
from gpuroi.cohort._discover import (
    MapFile,
    find_maps,
    part_of,
    refuse_if_all_are_missing,
)
from gpuroi.cohort._engines import Engine, ThisProcess, each_outcome
from gpuroi.cohort._ledger import Ledger, Record, disk_errors
from gpuroi.cohort._outputs import (
    is_whole,
    map_name,
    output_names,
    remove_outputs,
    remove_temporaries,
    stems_of_name,
    written_names,
)
from gpuroi.cohort._processes import Processes, can_start
from gpuroi.cohort._summary import remove_summary, write_failures, write_summary
from gpuroi.cohort._tasks import Job, Tools, check, extract, failed, identify, make_tools
from gpuroi.errors import OutputError, WorkerDiedError
from gpuroi.recipe import Recipe, recipe_of

_CHECKS_A_UNIT = 64

# Maps that a task of Dask holds, which costs about as much as a small one.
_MAPS_A_TASK = 16

# Small files are handed to a process several at once: a message takes as long as their writing.
_BYTES_A_MESSAGE = 2**20
_MOST_A_MESSAGE = 8

# What a device is given at once by each process, and the most maps of it.
_BYTES_FOR_DEVICE = 64 * 2**20
_MOST_FOR_DEVICE = 128


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes
    ----------
    n_to_do : int
        Maps that this run has to work on.
    n_skipped : int
        Maps that an earlier one has done.
    n_done, n_failed : int
        Maps that have ended in this run; failures of an earlier one that stay are counted, too.
    latest : Record or None
        Of the map that has just ended; None when the run begins.
    """

    n_to_do: int
    n_skipped: int
    n_done: int = 0
    n_failed: int = 0
    latest: Record | None = None


@dataclass(frozen=True)
class CohortReport:
    """What became of a cohort.

    Attributes
    ----------
    folder : Path
        Of the outputs.
    parameters : dict
        Of the extraction, as in the provenance.
    maps : tuple of MapFile
        In the order of the inputs.
    records : tuple of Record
        What became of each map, in this run or an earlier one.
    n_done, n_skipped : int
        Maps done in this run, and by earlier ones.
    failures : tuple of Record
        Of the maps that failed, in this run or an earlier one.
    summary : dict of str to Path
        ``description``, ``regions``, ``overlap`` and ``failures``, those that were written; empty
        while other shards run.
    """

    folder: Path
    parameters: dict[str, Any]
    maps: tuple[MapFile, ...]
    records: tuple[Record, ...]
    n_done: int
    n_skipped: int
    failures: tuple[Record, ...]
    summary: dict[str, Path] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return how many maps there are: a notebook is not to show each."""
        return (
            f"CohortReport({len(self.maps)} maps in {str(self.folder)!r}: {self.n_done} done, "
            f"{self.n_skipped} done before, {len(self.failures)} failed)"
        )


def extract_cohort(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    recipe: Recipe | Mapping[str, Any] | None = None,
    *,
    entities: Mapping[str, str | Sequence[str]] | None = None,
    shard: tuple[int, int] | None = None,
    limit: int | None = None,
    jobs: int | None = None,
    batch_size: int | None = None,
    retry_failed: bool = False,
    backend: str = "auto",
    on_gpu_error: Literal["stop", "cpu"] = "stop",
    client: Any = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> CohortReport:
    """Write the regions of many maps, in processes, and go on where an earlier run was stopped.

    Parameters
    ----------
    inputs : path or paths
        Files, folders, patterns, lists (``"@maps.txt"``), BIDS datasets; see `find_maps`.
    out_dir : path
        For each map a label image, a table and a ``.json``, below the folders that the input has;
        of two maps or more ``regions.tsv`` and ``overlap.nii.gz``; ``failures.tsv`` if there are
        any; ``dataset_description.json``; and the ledger, in ``.gpuroi``.
    recipe : Recipe or mapping, optional
        Parameters of `gpuroi.extract_regions`, such as ``{"threshold": 3.0}``.
    entities, shard, limit
        Which of the maps; see `find_maps`. The summaries of shards are written by the one that ends
        last.
    jobs : int, optional
        Processes; by default one for each core that may be used. There are none where this one may
        not start any, as in a pool.
    batch_size : int, optional
        Maps that are handed to a device or to a worker of Dask at once; by default as many as keep
        it busy.
    retry_failed : bool
        Try again what failed before and has not changed since.
    backend : {"auto", "cpu", "cuda"}
        Where to compute. With a device, the processes read, measure and write, and one more for
        each device computes for all of them.
    on_gpu_error : {"stop", "cpu"}
        Whether a device that fails ends the run, to be gone on with later, or the rest is computed
        on the CPU.
    client : distributed.Client, optional
        Run on the workers of a Dask cluster instead of `jobs` processes; all of them see the inputs
        and `out_dir` at the same paths, and use the `backend` they have.
    on_progress : callable, optional
        Called with a `Progress` when the work begins and after each map.

    Returns
    -------
    CohortReport

    Raises
    ------
    ValueError, TypeError
        If nothing is found, two maps would write to one place, a map or a file of somebody else
        would be replaced, or a parameter is wrong.
    FolderInUseError
        If another run writes to `out_dir`.
    DeviceLostError
        If a device fails and `on_gpu_error` is ``"stop"``.
    WorkerDiedError
        If the system starts no processes, or ends those that sum up.
    OutputError
        If the disk of `out_dir` is full or read-only.
    OutputChangedError
        If outputs are changed by others before they are summed up.
    BackendUnavailableError, UnknownBackendError
        If `backend` cannot run here, or does not exist.
    MissingExtraError
        If BIDS names are to be read and nilearn is not installed.

    Notes
    -----
    Whatever ends a run, even SIGKILL, the same call goes on with what is left. A map is done again
    if it, the parameters, the version of gpuroi or one of its outputs have changed.

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
    from gpuroi import __version__

    if isinstance(inputs, str | os.PathLike):
        inputs = [inputs]
    chosen = recipe if isinstance(recipe, Recipe) else recipe_of({} if recipe is None else recipe)
    check_choice("on_gpu_error", on_gpu_error, ("stop", "cpu"))
    n_jobs = _n_cores() if jobs is None else at_least_one("jobs", jobs, "processes")
    if batch_size is not None:
        batch_size = at_least_one("batch_size", batch_size, "maps")
    folder = Path(out_dir).expanduser().absolute()
    everything = find_maps(inputs, entities=entities)
    refuse_if_all_are_missing(everything)
    if client is not None:  # its workers have folders of their own that they work in
        everything = [replace(one, path=one.source) for one in everything]
    maps = part_of(everything, shard=shard, limit=limit)
    shards = [shard] if shard is None else [(i, shard[1]) for i in range(1, shard[1] + 1)]
    cohort = list(chain.from_iterable(part_of(everything, shard=i, limit=limit) for i in shards))
    refuse_to_replace(folder, everything, chosen.mask_files())
    if client is None or backend not in ("auto", *names()):  # what the workers have, they tell
        backend = get_backend(backend).name
    refuse = partial(refuse_to_forget, folder, maps, {one.source for one in everything})
    with disk_errors(folder), Ledger(folder, shard, refuse) as ledger:
        job = Job(
            folder,
            chosen,
            digest(chosen),
            backend,
            on_gpu_error == "cpu",
            __version__,
            ledger.run,
        )
        run = _Run(job, ledger, everything, on_progress or (lambda progress: None))
        try:
            with ExitStack() as stack:
                engine, unit_size = _engine(stack, job, maps, n_jobs, batch_size, client)
                run.work_on(engine, run.to_do(engine, maps, retry_failed), unit_size)
                records = tuple(ledger.records[one.source] for one in maps)
                with ledger.last_of_shards(_work(job, cohort)) as is_last:
                    summary = run.sum_up(engine, cohort) if is_last else {}
        except OutputError:  # nobody works any more: what room is left is for the failures
            ledger.give_up_reserve()
            with contextlib.suppress(OSError):
                write_failures(folder, run.records_of(maps))
            raise
        finally:
            remove_temporaries(folder, {one.stem for one in maps})  # of processes that have died
    return CohortReport(
        folder,
        chosen.describe(),
        tuple(maps),
        records,
        run.n_done,
        run.n_skipped,
        tuple(run.failures),
        summary,
    )


class _Run:
    """The work of one run, counted.

    `everything` are the maps of all shards, whose outputs are not to be touched.
    """

    def __init__(
        self,
        job: Job,
        ledger: Ledger,
        everything: list[MapFile],
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._job = job
        self._ledger = ledger
        self._stems = {one.stem for one in everything}
        self._sources = {one.source for one in everything}
        self._on_progress = on_progress
        self.n_done = 0
        self.n_skipped = 0
        self.failures: list[Record] = []

    def to_do(self, engine: Engine, maps: list[MapFile], retry_failed: bool) -> list[MapFile]:
        """Return the maps to work on; count those that are done, and keep failures that stay."""
        todo = []
        seem_done: dict[str, tuple[MapFile, Record]] = {}
        for one in maps:
            record = self._latest(one)
            if record is None or not self._is_of(record, one):
                todo.append(one)
            elif record.status == "done":
                seem_done[record.source] = one, record
            elif retry_failed or record.error == OutputError.__name__:
                todo.append(one)
            else:
                self.failures.append(record)
        records = [record for _, record in seem_done.values()]
        for record, as_written in each_outcome(engine, check, records, _CHECKS_A_UNIT):
            if as_written is True:
                self.n_skipped += 1
                del seem_done[record.source]
                if self._ledger.records[record.source] is not record:
                    self._ledger.add(record)
        if not seem_done:
            return todo
        again = {*todo, *(one for one, _ in seem_done.values())}
        return [one for one in maps if one in again]

    def _latest(self, one: MapFile) -> Record | None:
        """Return what became of a map the last time that it could be looked at."""
        record, done = (of.get(one.source) for of in (self._ledger.records, self._ledger.done))
        return done if record and record.is_missing and done and self._is_of(done, one) else record

    def _is_of(self, record: Record, one: MapFile) -> bool:
        """Return whether `record` is of this map as it is now, and of these parameters."""
        return (
            (record.size, record.mtime_ns) == identify(one.path)
            and record.parameters == self._job.parameters
            and record.stem == one.stem
        )

    def records_of(self, maps: Iterable[MapFile]) -> list[Record]:
        """Return the records of these maps that are of these parameters."""
        found = (self._ledger.records.get(one.source) for one in maps)
        return [one for one in found if one and one.parameters == self._job.parameters]

    def work_on(self, engine: Engine, todo: list[MapFile], unit_size: int) -> None:
        """Extract the maps, and write down what becomes of each as it ends."""
        self._tell(len(todo), None)
        self._remove_leftovers({one.stem for one in todo} | self._ledger.leftovers)
        self._ledger.settle()
        for kept in self.failures:
            remove_outputs(self._job.folder, self._superseded_by(kept))
        if todo:
            remove_summary(self._job.folder)
        outcome: Any
        for one, outcome in each_outcome(engine, extract, self._begun(todo), unit_size):
            if isinstance(outcome, WorkerDiedError):
                outcome = failed(one, self._job.parameters, outcome)
                remove_outputs(self._job.folder, self._written({one.stem}))
            remove_outputs(self._job.folder, self._superseded_by(outcome))
            self._ledger.add(outcome)
            if outcome.error == OutputError.__name__:
                raise OutputError(outcome.message)
            if outcome.status == "done":
                self.n_done += 1
            else:
                self.failures.append(outcome)
            self._tell(len(todo), outcome)

    def _begun(self, todo: list[MapFile]) -> Iterator[MapFile]:
        for one in todo:
            self._ledger.begin(one.stem)
            yield one

    def _remove_leftovers(self, stems: Set[str]) -> None:
        """Remove what a run has left of maps that was killed before it wrote them down."""
        remove_temporaries(self._job.folder, stems)
        unended = self._ledger.unended.keys() & stems
        known: set[str] = set()
        for owner in filter(None, map(self._ledger.owners.get, unended)):
            names = set(output_names(owner.stem, owner.n_volumes))
            if is_whole(self._job.folder, owner):
                known |= names
            else:  # some were about to be replaced
                remove_outputs(self._job.folder, names)
        for name in self._written(unended) - known:
            begun_ns = max(self._ledger.unended.get(stem, 0) for stem in stems_of_name(name))
            remove_outputs(self._job.folder, [name], since_ns=begun_ns)

    def _written(self, stems: Set[str]) -> set[str]:
        """Return the names of outputs of `stems` that are there, but for those of other maps."""
        others = (self._stems | set(self._ledger.owners)) - stems
        written = written_names(self._job.folder, stems)
        return {name for name in written if map_name(name) not in others}

    def _superseded_by(self, now: Record) -> set[str]:
        """Return the names of outputs that an earlier run has written, and `now` replaces.

        Of this map, and of another one of the same stem; but not what belongs to others, who may
        have been given the stem that this map had. A map that is only missing replaces nothing
        that is whole, and of these parameters.
        """
        before = self._ledger.done.get(now.source)
        stems = {now.stem} | ({before.stem} if before and before.stem not in self._stems else set())
        superseded: set[str] = set()
        for owner in filter(None, map(self._ledger.owners.get, stems)):
            if owner.stem != now.stem and owner.source != now.source:
                continue
            of_these = owner.parameters == now.parameters
            is_elsewhere = owner.source != now.source and owner.source in self._sources
            is_kept = now.is_missing and of_these and not is_elsewhere
            if is_kept and is_whole(self._job.folder, owner):
                continue
            superseded |= {
                name
                for name in output_names(owner.stem, owner.n_volumes)
                if map_name(name) == owner.stem or map_name(name) not in self._stems
            }
        return superseded - set(output_names(now.stem, now.n_volumes))

    def sum_up(self, engine: Engine, cohort: list[MapFile]) -> dict[str, Path]:
        """Write the summaries of `cohort` if all its maps have ended; return their paths."""
        records = self.records_of(cohort)
        if len(records) < len(cohort):  # a shard has ended before, with other parameters
            return {}
        sources = self._ledger.sources() | {one.source for one in cohort}
        return write_summary(self._job.folder, engine, records, sources)

    def _tell(self, n_to_do: int, latest: Record | None) -> None:
        self._on_progress(
            Progress(n_to_do, self.n_skipped, self.n_done, len(self.failures), latest)
        )


def digest(recipe: Recipe) -> str:
    """Return what tells one set of parameters from another; of masks, it is their voxels."""
    from gpuroi import __version__

    described = recipe.describe()
    masks: dict[str, Any] = {"mask_img": recipe.mask_img, "population": recipe.population}
    voxels = hashlib.sha256()
    for name, mask in masks.items():
        if mask is not None and not isinstance(mask, str):
            described[name] = "an image"  # by whatever path
            voxels.update(np.ascontiguousarray(mask.dataobj).tobytes())
            voxels.update(np.ascontiguousarray(mask.affine).tobytes())
    content = json.dumps([__version__, described, voxels.hexdigest()])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _work(job: Job, cohort: list[MapFile]) -> str:
    """Return what tells the work of some shards from that of others."""
    content = json.dumps([job.parameters, [one.source for one in cohort]])
    return hashlib.sha256(content.encode()).hexdigest()


def _engine(
    stack: ExitStack,
    job: Job,
    maps: list[MapFile],
    n_jobs: int,
    batch_size: int | None,
    client: Any,
) -> tuple[Engine, int]:
    """Return what runs the tasks, and how many maps are handed over at once."""
    if client is not None:
        return stack.enter_context(Cluster(client, make_tools, (job,))), batch_size or _MAPS_A_TASK
    if len(maps) < 2 or not can_start():
        return stack.enter_context(ThisProcess(Tools(job))), 1
    n_processes = min(n_jobs, len(maps))
    if not _is_device(get_backend(job.backend)):
        engine = Processes(n_processes, make_tools, (job,))
        return stack.enter_context(engine), _maps_a_message(maps, n_processes)
    consumers = [
        stack.enter_context(Consumer(job.backend, environment, job.recipe))
        for environment in environments(job.backend)
    ]
    in_turn = cycle(consumers)
    engine = Processes(n_processes, make_tools, (job,), lambda: next(in_turn).connect())
    return stack.enter_context(engine), batch_size or _batch_for_device(maps[0])


def _is_device(backend: Backend) -> bool:
    return backend.batch_bytes > 1  # a host takes its maps one by one


def _maps_a_message(maps: list[MapFile], n_processes: int) -> int:
    n_bytes, _ = identify(maps[0].path)
    n_maps = min(_BYTES_A_MESSAGE // max(1, n_bytes), len(maps) // (8 * n_processes))
    return min(_MOST_A_MESSAGE, max(1, n_maps))


def _batch_for_device(first: MapFile) -> int:
    """Return how many maps like the first are enough for a device."""
    try:
        image: Any = nib.load(first.path)
        n_bytes: int = 4 * math.prod(image.shape)
    except Exception:  # of a map that fails, nothing follows for the others
        return 1
    return min(_MOST_FOR_DEVICE, max(1, _BYTES_FOR_DEVICE // max(1, n_bytes)))


def _n_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

"""Jobs on a Dask cluster, whose workers may die."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from gpuroi.cohort._workers import WorkerDiedError

_Job = TypeVar("_Job")
_Outcome = TypeVar("_Outcome")

_work_of_process: dict[Any, Callable[[Any], Any]] = {}


def run_on_dask(
    client: Any,
    jobs: Sequence[_Job],
    batch_size: int,
    make_work: Callable[..., Callable[[_Job], _Outcome]],
    arguments: tuple[Any, ...],
) -> Iterator[tuple[_Job, _Outcome | WorkerDiedError]]:
    """Yield each job with what became of it, as `gpuroi.cohort._workers.run_jobs` does.

    Batches, because a task of Dask costs about as much as a small map. Batches in which workers
    keep dying are done in the end, one job after the other, so that only those that kill are lost:
    of several that a worker holds when it dies, Dask suspects all.
    """
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    # Sent once, not with each batch: a recipe may hold a mask. A task, unlike scattered data, is
    # done again when the worker that holds its result dies.
    shared = client.submit(_together, make_work, arguments, pure=False)
    batches = [list(jobs[i : i + batch_size]) for i in range(0, len(jobs), batch_size)]
    submitted = {client.submit(_do, batch, shared, pure=False): batch for batch in batches}
    suspects: list[_Job] = []
    for future in as_completed(submitted):
        batch = submitted[future]
        try:
            yield from zip(batch, future.result(), strict=True)
        except KilledWorker:
            suspects += batch
    for job in suspects:
        try:
            (outcome,) = client.submit(_do, [job], shared, pure=False).result()
        except KilledWorker:
            yield job, WorkerDiedError("the workers that were given it died, one by one.")
        else:
            yield job, outcome


def _together(make_work: Any, arguments: Any) -> tuple[Any, Any]:
    return make_work, arguments


def _do(batch: list[Any], shared: tuple[Callable[..., Any], tuple[Any, ...]]) -> list[Any]:
    make_work, arguments = shared
    key = repr((make_work.__qualname__, arguments))
    if key not in _work_of_process:
        _work_of_process.clear()
        _work_of_process[key] = make_work(*arguments)
    return [_work_of_process[key](job) for job in batch]

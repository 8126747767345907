"""The workers of a Dask cluster, which may be many machines, and may die."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from types import TracebackType
from typing import Any

from gpuroi.cohort._engines import Engine, Job, Outcome, Task, WorkerDiedError

# Tasks that the scheduler holds for each thread of the cluster; of a large cohort, not all at once.
_TASKS_A_THREAD = 4

_tools_of_process: dict[str, Any] = {}


class Cluster(Engine):
    """Runs tasks on the workers of a `distributed.Client`; a unit is a task of Dask.

    A task of Dask costs about as much as a small map: units should hold several. Dask gives a unit
    to other workers when one dies, until it suspects the unit itself.
    """

    def __init__(self, client: Any, make_tools: Callable[..., Any], arguments: tuple[Any, ...]):
        self._client = client
        # Sent once, not with each unit: a recipe may hold a mask. A task, unlike scattered data, is
        # done again when the worker that holds its result dies.
        self._shared = client.submit(_together, make_tools, arguments, pure=False)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._shared.release()

    def run(
        self, task: Task[Job, Outcome], units: Iterable[tuple[Job, ...]]
    ) -> Iterator[tuple[tuple[Job, ...], Sequence[Outcome] | WorkerDiedError]]:
        """Yield each of `units` with what became of it, in the order in which they end."""
        from distributed import as_completed
        from distributed.scheduler import KilledWorker

        remaining = iter(units)
        submitted: dict[Any, tuple[Job, ...]] = {}

        def submit(n: int) -> list[Any]:
            new = {
                self._client.submit(_do, task, unit, self._shared, pure=False): unit
                for unit in islice(remaining, n)
            }
            submitted.update(new)
            return list(new)

        ending = as_completed(submit(_TASKS_A_THREAD * max(1, sum(self._client.ncores().values()))))
        for future in ending:
            unit = submitted.pop(future)
            try:
                outcomes = future.result()
            except KilledWorker:
                outcomes = WorkerDiedError("the workers that were given it died, one by one.")
            for new in submit(1):
                ending.add(new)
            yield unit, outcomes


def _together(make_tools: Any, arguments: Any) -> tuple[Any, Any]:
    return make_tools, arguments


def _do(
    task: Task[Any, Any], unit: tuple[Any, ...], shared: tuple[Callable[..., Any], tuple[Any, ...]]
) -> Any:
    make_tools, arguments = shared
    key = repr((make_tools.__qualname__, arguments))
    if key not in _tools_of_process:
        _tools_of_process.clear()
        _tools_of_process[key] = make_tools(*arguments)
    return task(_tools_of_process[key], unit)

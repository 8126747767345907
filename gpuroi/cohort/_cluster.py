"""The workers of a Dask cluster, which may be many machines, and may die."""

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any
from uuid import uuid4

from gpuroi.cohort._engines import Engine, Job, Outcome, Task
from gpuroi.errors import ClusterLostError, WorkerDiedError

# Tasks that the scheduler holds for each thread of the cluster; of a large cohort, not all at once.
_TASKS_A_THREAD = 4

# Of a worker: each thread's tools, and how many units of each run are worked on.
_of_thread = threading.local()
_lock = threading.Lock()
_n_at_work: Counter[str] = Counter()
_ended: set[str] = set()


class Cluster(Engine):
    """Runs tasks on the workers of a `distributed.Client`; a unit is a task of Dask.

    A task of Dask costs about as much as a small map: units should hold several. Dask gives a unit
    to other workers when one dies, until it suspects the unit itself, and all that waited there
    with it.
    """

    knows_who_killed = False

    def __init__(self, client: Any, make_tools: Callable[..., Any], arguments: tuple[Any, ...]):
        self._client = client
        self._run_id = uuid4().hex
        self._submitted: dict[Any, tuple[Any, ...]] = {}
        # Sent once, not with each unit: a recipe may hold a mask. A task, unlike scattered data, is
        # done again when the worker that holds its result dies.
        self._shared = client.submit(
            _together, self._run_id, make_tools, arguments, pure=False, key=f"job-{self._run_id}"
        )
        try:  # what no worker can do is told before anything is done
            client.submit(_do, _nothing, (), self._shared, pure=False).result()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        """Wait until no worker writes any more, whatever has ended the run."""
        with contextlib.suppress(Exception):  # there may be nobody left to ask
            self._client.cancel([*self._submitted, self._shared], force=True)
            self._client.run(_end, self._run_id, on_error="ignore")
        self._submitted.clear()

    def run(
        self, task: Task[Job, Outcome], units: Iterable[tuple[Job, ...]]
    ) -> Iterator[tuple[tuple[Job, ...], Sequence[Outcome] | WorkerDiedError]]:
        """Yield each of `units` with what became of it, in the order in which they end.

        Raises
        ------
        ClusterLostError
            If the scheduler no longer answers.
        """
        from distributed import CancelledError, as_completed
        from distributed.comm.core import CommClosedError
        from distributed.scheduler import KilledWorker

        remaining = iter(units)

        def submit() -> list[Any]:
            """Submit as much as keeps the workers busy that there are by now."""
            n_wanted = _TASKS_A_THREAD * max(1, sum(self._client.ncores().values()))
            new = {
                self._client.submit(_do, task, unit, self._shared, pure=False): unit
                for unit in islice(remaining, max(0, n_wanted - len(self._submitted)))
            }
            self._submitted |= new
            return list(new)

        try:
            ending = as_completed(submit())
            for future in ending:
                unit = self._submitted.pop(future)
                try:
                    outcomes = future.result()
                except KilledWorker:
                    outcomes = WorkerDiedError("the workers that were given it died, one by one.")
                ending.update(submit())
                yield unit, outcomes
        except (CancelledError, CommClosedError) as error:
            raise ClusterLostError(
                f"the scheduler of the cluster no longer answers ({error}). What is done is kept; "
                "run again to go on."
            ) from error


def _together(run_id: str, make_tools: Any, arguments: Any) -> tuple[str, Any, Any]:
    return run_id, make_tools, arguments


def _do(
    task: Task[Any, Any],
    unit: tuple[Any, ...],
    shared: tuple[str, Callable[..., Any], tuple[Any, ...]],
) -> Any:
    run_id, make_tools, arguments = shared
    with _lock:
        if run_id in _ended:
            return []
        _n_at_work[run_id] += 1
    try:
        if getattr(_of_thread, "run_id", None) != run_id:
            _of_thread.tools, _of_thread.run_id = make_tools(*arguments), run_id
        return task(_of_thread.tools, unit)
    finally:
        with _lock:
            _n_at_work[run_id] -= 1


def _nothing(tools: Any, unit: tuple[Any, ...]) -> list[Any]:
    return []


async def _end(run_id: str) -> None:
    """Begin no unit of a run any more, and wait until those that were begun are over."""
    with _lock:
        _ended.add(run_id)
    while _n_at_work[run_id]:
        await asyncio.sleep(0.05)

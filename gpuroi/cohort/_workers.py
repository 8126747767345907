"""Processes that each work on a map at a time, and may die.

A pool of the standard library breaks as a whole when one of its processes is killed, as the system
does when memory runs out. Here every process says which job it begins, so that its death costs that
job alone.
"""

import contextlib
import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from typing import Any, Generic, TypeVar

_Job = TypeVar("_Job")
_Outcome = TypeVar("_Outcome")

# A process that dies before it has begun a job would die again.
_MOST_EARLY_DEATHS = 3


class WorkerDiedError(RuntimeError):
    """A process ended in the middle of a job."""


@dataclass
class _Worker(Generic[_Job]):
    process: Any
    connection: Connection
    assigned: deque[tuple[int, _Job]] = field(default_factory=deque)
    begun: int | None = None


def run_jobs(
    jobs: Sequence[_Job],
    n_workers: int,
    batch_size: int,
    make_work: Callable[..., Callable[[_Job], _Outcome]],
    arguments: tuple[Any, ...],
) -> Iterator[tuple[_Job, _Outcome | WorkerDiedError]]:
    """Yield each job with what became of it, in the order in which they end.

    Parameters
    ----------
    jobs : sequence
    n_workers : int
    batch_size : int
        Jobs that a process is given at once.
    make_work : callable
        Called once in each process with `arguments`; what it returns is called with each job, and
        raises nothing.
    """
    context = _context()
    pending = deque(enumerate(jobs))
    workers: list[_Worker[_Job]] = []
    early_deaths = 0
    try:
        while pending or any(worker.assigned for worker in workers):
            while pending and len(workers) < n_workers:
                workers.append(_start(context, make_work, arguments))
            for worker in workers:
                if pending and not worker.assigned:
                    size = min(batch_size, max(1, len(pending) // n_workers))
                    batch = [pending.popleft() for _ in range(min(size, len(pending)))]
                    _assign(worker, batch)
            connections = {worker.connection: worker for worker in workers if worker.assigned}
            for ready in wait(list(connections)):
                worker = connections[ready]  # type: ignore[index]
                try:
                    number, has_ended, outcome = worker.connection.recv()
                except (EOFError, OSError):
                    workers.remove(worker)
                    early_deaths += worker.begun is None
                    if early_deaths > _MOST_EARLY_DEATHS:
                        raise WorkerDiedError(
                            f"worker processes end before they begin ({_ending(worker)})."
                        ) from None
                    if worker.begun is not None:
                        _, job = worker.assigned.popleft()
                        yield (
                            job,
                            WorkerDiedError(
                                f"the process that worked on it ended ({_ending(worker)})."
                            ),
                        )
                    pending.extendleft(reversed(worker.assigned))
                    continue
                if has_ended:
                    _, job = worker.assigned.popleft()
                    worker.begun = None
                    yield job, outcome
                else:
                    worker.begun = number
    finally:
        for worker in workers:
            worker.connection.close()  # which ends the process once its map is done
            if worker.assigned:
                worker.process.terminate()
        for worker in workers:
            worker.process.join()


def _context() -> BaseContext:
    """Return how processes are started: never by a fork of one that may have threads."""
    method = "forkserver" if sys.platform != "win32" else "spawn"
    return multiprocessing.get_context(method)


def _start(context: Any, make_work: Callable[..., Any], arguments: tuple[Any, ...]) -> _Worker[Any]:
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, make_work, arguments), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _assign(worker: _Worker[_Job], batch: list[tuple[int, _Job]]) -> None:
    worker.assigned.extend(batch)
    worker.begun = None
    with contextlib.suppress(OSError):  # it has died; the next wait finds out
        worker.connection.send(batch)


def _serve(
    connection: Connection,
    make_work: Callable[..., Callable[[Any], Any]],
    arguments: tuple[Any, ...],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    work = make_work(*arguments)
    while True:
        try:
            batch = connection.recv()
            for number, job in batch:
                connection.send((number, False, None))
                connection.send((number, True, work(job)))
        except (EOFError, OSError):
            return  # the parent has gone


def _ending(worker: _Worker[Any]) -> str:
    worker.process.join(5)
    code = worker.process.exitcode
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"{name}, perhaps for want of memory" if name == "SIGKILL" else name
    return f"exit code {code}"

"""Processes of this machine that work on a unit at a time, and may die.

A pool of the standard library breaks as a whole when one of its processes is killed, as the system
does when memory runs out. Here each process has a pipe of its own, so that its death costs what it
was working on, and nothing else.
"""

import contextlib
import errno
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any

from gpuroi.cohort._engines import Engine, Job, Outcome, Task
from gpuroi.errors import WorkerDiedError

CONTEXT: Any = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")

# Windows waits for no more than 63 things at once.
_MOST_WORKERS = 60 if sys.platform == "win32" else sys.maxsize

# Units that a process is given at once: hides the way there and back.
_AHEAD = 8

# What a process may need for its last unit, so that it leaves no map with some of its files.
_MOST_SECONDS_TO_END = 20

# A process that dies before it can begin would die again.
_MOST_EARLY_DEATHS = 3


_starting = threading.Lock()


@dataclass
class _Worker:
    process: Any
    connection: Connection
    assigned: deque[tuple[Any, ...]] = field(default_factory=deque)
    is_ready: bool = False


class Processes(Engine):
    """Runs tasks in processes, started when there is something to do, and again if they die.

    Parameters
    ----------
    n_workers : int
    make_tools : callable
        Called in each process with `arguments` and what `connect` returned for it.
    arguments : tuple
    connect : callable, optional
        Called before each start of a process.
    """

    knows_who_killed = True

    def __init__(
        self,
        n_workers: int,
        make_tools: Callable[..., Any],
        arguments: tuple[Any, ...],
        connect: Callable[[], Any] | None = None,
    ) -> None:
        self._n_workers = min(n_workers, _MOST_WORKERS)
        self._make_tools = make_tools
        self._arguments = arguments
        self._connect = connect
        self._workers: list[_Worker] = []
        self._n_early_deaths = 0

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.connection.close()  # which ends the process once its unit is done
        for worker in self._workers:
            worker.process.join(_MOST_SECONDS_TO_END)
            worker.process.terminate()
            worker.process.join()
        self._workers.clear()

    def run(
        self, task: Task[Job, Outcome], units: Iterable[tuple[Job, ...]]
    ) -> Iterator[tuple[tuple[Job, ...], Sequence[Outcome] | WorkerDiedError]]:
        """Yield each of `units` with what became of it, in the order in which they end."""
        pending = _Pending(units)
        while pending or any(worker.assigned for worker in self._workers):
            self._hand_out(task, pending)
            busy: dict[Any, _Worker] = {
                worker.connection: worker for worker in self._workers if worker.assigned
            }
            for ready in wait(list(busy)):
                worker = busy[ready]
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    self._workers.remove(worker)
                    death = self._death_of(worker)
                    if worker.is_ready and worker.assigned:
                        yield worker.assigned.popleft(), death
                    pending.put_back(worker.assigned)
                    continue
                if not worker.is_ready:
                    worker.is_ready = True
                    self._n_early_deaths = 0
                elif isinstance(message, Exception):
                    raise message
                else:
                    yield worker.assigned.popleft(), message

    def _hand_out(self, task: Task[Any, Any], pending: "_Pending") -> None:
        """Give every process something to do, evenly where little is left, and start them."""
        while len(self._workers) < self._n_workers and (
            len(self._workers) < len(pending.look_ahead(self._n_workers))
        ):
            self._workers.append(self._start())
        # Only to a process that waits for it: one that is busy may itself be waiting until its
        # outcomes are read, and both would wait for ever. Less and less towards the end, so that
        # all end together.
        n_left = len(pending.look_ahead(2 * self._n_workers * _AHEAD))
        share = max(1, n_left // (2 * self._n_workers))
        for worker in list(self._workers):
            if worker.is_ready and not worker.assigned and not worker.process.is_alive():
                self._workers.remove(worker)  # it died idle: no unit's fault
            elif not worker.assigned and pending:
                units = pending.take(min(share, _AHEAD))
                worker.assigned.extend(units)
                with contextlib.suppress(OSError):  # it has died; the next wait finds out
                    worker.connection.send((task, units))

    def _start(self) -> _Worker:
        ours, theirs = CONTEXT.Pipe()
        extra = () if self._connect is None else (self._connect(),)
        process = start(_serve, theirs, self._make_tools, (*self._arguments, *extra))
        theirs.close()
        return _Worker(process, ours)

    def _death_of(self, worker: _Worker) -> WorkerDiedError:
        ending = how_it_ended(worker.process)
        if worker.is_ready:
            return WorkerDiedError(f"the process that worked on it ended ({ending}).")
        self._n_early_deaths += 1
        if self._n_early_deaths > _MOST_EARLY_DEATHS:
            raise WorkerDiedError(f"worker processes end before they begin ({ending}).")
        return WorkerDiedError("it had not begun.")


class _Pending:
    """Units to hand out, taken from an iterable as they are needed."""

    def __init__(self, units: Iterable[tuple[Any, ...]]) -> None:
        self._rest = iter(units)
        self._next: deque[tuple[Any, ...]] = deque()

    def __bool__(self) -> bool:
        return bool(self.look_ahead(1))

    def look_ahead(self, n: int) -> Sequence[tuple[Any, ...]]:
        self._next.extend(islice(self._rest, max(0, n - len(self._next))))
        return self._next

    def take(self, n: int) -> list[tuple[Any, ...]]:
        self.look_ahead(n)
        return [self._next.popleft() for _ in range(min(n, len(self._next)))]

    def put_back(self, units: deque[tuple[Any, ...]]) -> None:
        self._next.extendleft(reversed(units))


def can_start() -> bool:
    """Return whether this process may start others: those of pools may not."""
    known = {None, *multiprocessing.get_all_start_methods()}  # loky's is none of these
    is_known = multiprocessing.get_start_method(allow_none=True) in known
    return is_known and not multiprocessing.current_process().daemon


def start(target: Callable[..., None], *arguments: Any) -> Any:
    """Return a process that has been started: never by a fork of one that may have threads.

    Such a process reads the program's main script anew, which takes as long as its imports, and
    begins everything again if it has no ``if __name__ == "__main__":``. None of it is needed here,
    and without a file the main module is left alone.

    Raises
    ------
    WorkerDiedError
        If the system starts none.
    """
    process: Any = CONTEXT.Process(target=_in_process, args=(target, *arguments), daemon=True)
    with _starting, _without_interrupts():
        main_module = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            process.start()
        except (OSError, EOFError) as error:
            advice = (
                f"the folder for temporary files, {tempfile.gettempdir()} (TMPDIR), needs room and "
                "a short path"
            )
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.EAGAIN):
                advice = "start fewer (jobs), or raise the limit (ulimit -n, ulimit -u)"
            raise WorkerDiedError(f"no process can be started ({error}); {advice}.") from error
        finally:
            sys.modules["__main__"] = main_module
    return process


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back, also from the process in the making, which would show a traceback."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_process(target: Callable[..., None], *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    target(*arguments)


def _end_with_parent() -> None:
    """End this process when its parent has: the next run is not to find it still writing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def how_it_ended(process: Any) -> str:
    """Return the signal or the exit code that ended `process`."""
    process.join(5)
    code = process.exitcode
    if code is not None and code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:  # of real time, which have no names
            return f"signal {-code}"
        return f"{name}, perhaps for want of memory" if name == "SIGKILL" else name
    return f"exit code {code}"


def _serve(
    connection: Connection, make_tools: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    with contextlib.suppress(EOFError, OSError):  # the parent has gone
        tools = make_tools(*arguments)
        connection.send("ready")
        while True:
            task, units = connection.recv()
            for unit in units:
                connection.send(_outcomes(task, tools, unit))


def _outcomes(task: Task[Any, Any], tools: Any, unit: tuple[Any, ...]) -> Any:
    try:
        return task(tools, unit)
    except Exception as error:
        return error

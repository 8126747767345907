"""What runs the tasks of a cohort: this process, others of this machine, or a Dask cluster.

A task is a function of a process's tools and a unit, some jobs that are done together; it returns
an outcome for each job. An engine makes the tools once in every process, and yields each unit with
its outcomes, as units end.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, Protocol, TypeVar

from gpuroi.errors import WorkerDiedError

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")
Task = Callable[[Any, tuple[Job, ...]], Sequence[Outcome]]


class Engine(AbstractContextManager["Engine"], Protocol):
    """Runs tasks, one after the other, until it is left.

    Attributes
    ----------
    knows_who_killed : bool
        Whether a process that died was working on just the unit that is yielded with its death.
    """

    knows_who_killed: bool

    def run(
        self, task: Task[Job, Outcome], units: Iterable[tuple[Job, ...]]
    ) -> Iterator[tuple[tuple[Job, ...], Sequence[Outcome] | WorkerDiedError]]:
        """Yield each of `units` with what became of it, in the order in which they end.

        An exception that a task raises ends the run.
        """


class ThisProcess(Engine):
    """Runs tasks here: what a single map is not worth a process for."""

    knows_who_killed = True

    def __init__(self, tools: Any) -> None:
        self._tools = tools

    def __exit__(self, *_: object) -> None:
        pass

    def run(
        self, task: Task[Job, Outcome], units: Iterable[tuple[Job, ...]]
    ) -> Iterator[tuple[tuple[Job, ...], Sequence[Outcome] | WorkerDiedError]]:
        """Yield each of `units` with its outcomes, in order."""
        for unit in units:
            yield unit, task(self._tools, unit)


def each_outcome(
    engine: Engine, task: Task[Job, Outcome], jobs: Iterable[Job], unit_size: int
) -> Iterator[tuple[Job, Outcome | WorkerDiedError]]:
    """Yield each of `jobs` with what became of it.

    The jobs of a unit whose process died are done again, one after the other and with no others
    beside them: only those that kill are lost.
    """
    suspects: list[Job] = []
    for unit, outcomes in engine.run(task, in_units(jobs, unit_size)):
        if not isinstance(outcomes, WorkerDiedError):
            yield from zip(unit, outcomes, strict=True)
        elif len(unit) == 1 and engine.knows_who_killed:
            yield unit[0], outcomes
        else:
            suspects += unit
    for job in suspects:
        for (alone,), outcomes in engine.run(task, [(job,)]):
            yield alone, outcomes if isinstance(outcomes, WorkerDiedError) else outcomes[0]


def in_units(jobs: Iterable[Job], size: int) -> Iterator[tuple[Job, ...]]:
    """Yield `jobs` in order, `size` at a time."""
    remaining = iter(jobs)
    while unit := tuple(islice(remaining, size)):
        yield unit

"""The mistakes that gpuroi tells apart, one class each.

Every class also derives from the built-in exception that fits it, so that code written for
nilearn (``except ValueError``) keeps working.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class GpuroiError(Exception):
    """Base of every error that gpuroi raises on purpose."""


class InvalidMapError(GpuroiError, ValueError):
    """A map, mask or file that cannot be read as a 3-D volume (or a series of them)."""


class DimensionError(InvalidMapError, TypeError):
    """An image with too few or too many axes; nilearn's error of that name is a TypeError."""


class UnknownBackendError(GpuroiError, ValueError):
    """A backend name that gpuroi has never heard of."""


class BackendUnavailableError(GpuroiError, RuntimeError):
    """A known backend that cannot run here; the message says why and what to install."""


class DeviceFullError(BackendUnavailableError):
    """A device that could run here, had others not taken its memory."""


class DeviceMemoryError(GpuroiError, MemoryError):
    """One single volume does not fit into the memory of the device."""


class DeviceLostError(GpuroiError, RuntimeError):
    """A device that answered before no longer does, whatever it is asked."""


class WorkerDiedError(GpuroiError, RuntimeError):
    """A process that could not be started, or ended in the middle of its work."""


class ClusterLostError(GpuroiError, RuntimeError):
    """A cluster whose scheduler no longer answers."""


class FolderInUseError(GpuroiError, RuntimeError):
    """An output folder that another run writes to."""


class OutputChangedError(GpuroiError, RuntimeError):
    """An output that is gone, or no longer as it was written."""


class OutputError(GpuroiError, OSError):
    """A disk that nothing can be written to: it is full, or read-only."""


class MissingExtraError(GpuroiError, ImportError):
    """A feature whose optional packages are not installed."""


class DownloadError(GpuroiError, OSError):
    """A file that could not be fetched; the message says from where, why, and what else to do."""


_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Yield a list that takes what `warn` says in the block, in this thread alone.

    What `warnings.catch_warnings` does for a whole process.
    """
    messages: list[str] = []
    token = _collected.set(messages)
    try:
        yield messages
    finally:
        _collected.reset(token)


def warn(message: str) -> None:
    """Warn the user: the warning points at the first line outside gpuroi."""
    if (messages := _collected.get()) is not None:
        messages.append(message)
        return
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("gpuroi."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)

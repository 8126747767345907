"""One process a device: it takes batches from the processes that decode, and says what it found.

Volumes come through shared memory, to which the decoders' processes write them as they lie in
files; what was found, a few percent of them, goes back through a pipe. Only the copy to the device
and the steps of the backend run here: measuring, compressing and writing are the decoders' again,
side by side.
"""

import contextlib
import mmap
import os
import signal
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuroi import io
from gpuroi.backends import get_backend
from gpuroi.cohort._processes import CONTEXT, start
from gpuroi.errors import (
    BackendUnavailableError,
    DeviceLostError,
    DeviceMemoryError,
    InvalidMapError,
)
from gpuroi.pipeline import COPIERS, ComputedBy, Finder, Found, Prepared, Upload
from gpuroi.recipe import Recipe

# Batches on their way to the device or on it: one is copied while the other is worked on.
_MOST_ON_DEVICE = 2

# Of these, RuntimeErrors are the device's, as CuPy's are; the others are of one map.
_TOLD_APART: tuple[type[Exception], ...] = (
    BackendUnavailableError,
    RuntimeError,
    DeviceMemoryError,
    InvalidMapError,
    ValueError,
)

_ENDED = "the process of the device has ended."


@dataclass(frozen=True)
class _Request:
    """A batch of maps, all on the grid of the first."""

    name: str
    affine: NDArray[np.float64]
    shape: tuple[int, int, int, int]  # (B, X, Y, Z)
    dtype: str
    new_bytes: int = 0  # size of the shared memory that comes behind; 0: of the latest
    volumes: NDArray[Any] | None = None  # where memory cannot be shared

    def volumes_in(self, memory: mmap.mmap) -> NDArray[Any]:
        """Return the volumes that lie in `memory`, x fastest, as in files."""
        n, x, y, z = self.shape
        return np.ndarray((n, z, y, x), self.dtype, memory).transpose(0, 3, 2, 1)


@dataclass(frozen=True)
class _Failure:
    """What an exception says: not every one can be sent, and made again, as it is."""

    kind: type[Exception]
    message: str

    @classmethod
    def of(cls, error: Exception) -> "_Failure":
        """Return the failure as the nearest of the classes that its reader tells apart."""
        for kind in _TOLD_APART:
            if isinstance(error, kind):
                return cls(kind, str(error))
        return cls(ValueError, f"{type(error).__name__}: {error}")  # of one map, not of the device


class Consumer:
    """The process of one device, as the run sees it.

    Parameters
    ----------
    backend : str
    environment : mapping
        Variables with which the process sees its device alone.
    recipe : Recipe
    """

    def __init__(self, backend: str, environment: Mapping[str, str], recipe: Recipe) -> None:
        self._control, theirs = CONTEXT.Pipe()
        self._process = start(_consume, theirs, backend, dict(environment), recipe)
        theirs.close()

    def __enter__(self) -> "Consumer":
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def connect(self) -> Connection:
        """Return a way to the device for one more process; of a lost one, a way that is closed."""
        ours: Connection
        theirs: Connection
        ours, theirs = CONTEXT.Pipe()
        with contextlib.suppress(OSError, EOFError):
            self._control.send(ours)
            self._control.recv()  # it is open there, and can be closed here
        ours.close()
        return theirs


class RemoteFinder:
    """Finds regions in batches of maps as `gpuroi.pipeline.Finder` does, where the device is."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._shared: mmap.mmap | None = None
        self._computed_by: ComputedBy | None = None
        self._batch_bytes = 0  # as every answer says

    @property
    def computed_by(self) -> ComputedBy:
        """What the provenance says of the device."""
        return self._introduction()

    @property
    def batch_bytes(self) -> int:
        """How much the device likes to be given at once: less, after what it had no room for."""
        self._introduction()
        return self._batch_bytes

    def _introduction(self) -> ComputedBy:
        if self._computed_by is None:
            with contextlib.suppress(OSError):  # it has ended; there is no answer
                self._connection.send(None)
            self._computed_by = self._answer()
        return self._computed_by

    def __call__(self, batch: list[Prepared]) -> list[Found]:
        """Return what is in each map of a batch of one grid and dtype.

        Raises
        ------
        DeviceLostError
            If the device no longer answers.
        """
        first = batch[0]
        request = _Request(
            first.source.name,
            first.source.affine,
            (len(batch), *first.volume.shape),
            first.volume.dtype.str,
        )
        try:
            if hasattr(os, "memfd_create"):
                self._share(request, batch)
            else:
                volumes = np.stack([prepared.volume for prepared in batch])
                self._connection.send(replace(request, volumes=volumes))
        except OSError as error:
            raise DeviceLostError(_ENDED) from error
        found: list[Found] = self._answer()
        return found

    def _share(self, request: _Request, batch: list[Prepared]) -> None:
        """Send `request`, its volumes through memory without a name: nobody has to remove it."""
        n_bytes = len(batch) * batch[0].volume.nbytes
        memory = None
        if self._shared is None or len(self._shared) < n_bytes:
            memory = os.memfd_create("gpuroi")
            os.ftruncate(memory, n_bytes)
            self._shared = mmap.mmap(memory, n_bytes)
        try:
            volumes = request.volumes_in(self._shared)
            for volume, prepared in zip(volumes, batch, strict=True):
                volume[...] = prepared.volume
            self._connection.send(replace(request, new_bytes=n_bytes if memory else 0))
            if memory is not None:
                send_handle(self._connection, memory, None)
        finally:
            if memory is not None:
                os.close(memory)

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise DeviceLostError(_ENDED) from error
        if isinstance(answer, _Failure):
            raise answer.kind(answer.message)
        what, self._batch_bytes = answer
        return what


@dataclass
class _Client:
    """A process that decodes, as the consumer sees it."""

    connection: Connection
    shared: mmap.mmap | None = None

    def volumes(self, request: _Request) -> NDArray[Any]:
        """Return the volumes of `request`, in the memory of the process that asks."""
        if request.volumes is not None:
            return request.volumes
        if request.new_bytes:
            self.shared = None  # if the new one cannot be had, the old one is not it
            memory = recv_handle(self.connection)
            try:
                self.shared = mmap.mmap(memory, request.new_bytes)
            finally:
                os.close(memory)
        assert self.shared is not None
        return request.volumes_in(self.shared)

    def answer(self, what: Any) -> None:
        with contextlib.suppress(OSError):  # it has died; the next wait finds out
            self.connection.send(_Failure.of(what) if isinstance(what, Exception) else what)


@dataclass
class _Waiting:
    client: _Client
    source: io.Map
    upload: Upload


class _Consumption:
    """The state of a consumer: who is connected, and what is on its way to the device."""

    def __init__(self, control: Connection, backend: str, recipe: Recipe) -> None:
        self._control = control
        self._backend = backend
        self._recipe = recipe
        self._clients: dict[Any, _Client] = {}
        self._waiting: deque[_Waiting] = deque()
        self._copiers = ThreadPoolExecutor(COPIERS)

    @cached_property
    def _finder(self) -> Finder:
        return Finder(self._recipe, get_backend(self._backend))

    def serve(self) -> None:
        """Answer until the run closes its end."""
        while True:
            for ready in wait([self._control, *self._clients], 0 if self._waiting else None):
                if ready is self._control:
                    try:
                        connection = self._control.recv()
                    except (EOFError, OSError):
                        return
                    self._clients[connection] = _Client(connection)
                    self._control.send("connected")
                elif len(self._waiting) < _MOST_ON_DEVICE:
                    self._take(self._clients[ready])
            if self._waiting:
                self._answer_first()

    def _take(self, client: _Client) -> None:
        """Say what the device is, or begin to copy a batch to it."""
        try:
            request = client.connection.recv()
        except (EOFError, OSError):
            del self._clients[client.connection]
            return
        try:
            if request is None:
                client.answer((self._finder.computed_by, self._finder.batch_bytes))
                return
            volumes = client.volumes(request)
            # No voxels: the finder keeps the grid that its masks are on.
            nothing = np.broadcast_to(np.zeros(1, request.dtype), request.shape[1:])
            source = io.Map(request.name, nothing, request.affine, None)
            self._waiting.append(_Waiting(client, source, self._begin(volumes)))
        except Exception as error:  # the process that asks knows whose failure it is
            client.answer(error)

    def _begin(self, volumes: NDArray[Any]) -> Upload:
        """Begin to copy a batch to the device, from memory that it reads while it computes."""
        staging = self._finder.staging(volumes.shape, volumes.dtype)
        for _ in self._copiers.map(np.copyto, staging.host, volumes):
            pass
        return self._finder.begin(staging, len(volumes))

    def _answer_first(self) -> None:
        first = self._waiting.popleft()
        try:
            found = self._finder.find(first.upload, first.source)
        except Exception as error:
            first.client.answer(error)
        else:
            first.client.answer((found, self._finder.batch_bytes))


def _consume(
    control: Connection, backend: str, environment: dict[str, str], recipe: Recipe
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run decides
    os.environ.update(environment)
    _Consumption(control, backend, recipe).serve()

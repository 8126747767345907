"""Copies to the device, on a device that copies as late as it may."""

import ctypes
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from gpuroi.backends._uploads import _MOST_COPIES, PinnedUploads


class Event:
    """The end of what had been queued when it was recorded."""

    def __init__(self, work):
        self.work = work
        self.done = False

    def synchronize(self):
        while self.work:
            self.work.pop(0)()
        self.done = True


class Stream:
    """Work is done when somebody waits for it, and not before."""

    allocating = None

    def __init__(self, non_blocking=False):
        self.non_blocking = non_blocking
        self.queue = []

    def record(self):
        return Event(list(self.queue))

    def wait_event(self, event):
        self.queue.append(event.synchronize)

    def __enter__(self):
        Stream.allocating = self

    def __exit__(self, *_):
        Stream.allocating = None


class DeviceArray:
    def __init__(self, shape, dtype):
        self.content = np.full(shape, 99, dtype)
        self.arena = Stream.allocating

    def transpose(self, *axes):
        """Return a view, which sees what is copied to the array later."""
        view = DeviceArray((), self.content.dtype)
        view.content = self.content.transpose(*axes)
        return view

    def set(self, host, stream):
        assert host.flags.c_contiguous
        # Which keep no memory alive.
        address, n_bytes, dtype = host.ctypes.data, host.nbytes, host.dtype

        def copy():
            read = np.frombuffer(ctypes.string_at(address, n_bytes), dtype)
            self.content[...] = read.reshape(self.content.shape)

        stream.queue.append(once(copy))


def once(work):
    pending = [work]
    return lambda: pending.pop()() if pending else None


class LazyDevice:
    """As much of CuPy as uploads use; memory that is given back is handed out again at once."""

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self, most_pinned=10**6):
        self.memory = []  # never freed: copies that come too late find what others have written
        self.current = Stream()
        self.current_device = 0
        self.most_pinned = most_pinned
        self.sizes = []  # of memory that was pinned
        self.free = []
        self.cuda = SimpleNamespace(
            Stream=Stream,
            Device=lambda: SimpleNamespace(id=self.current_device),
            get_current_stream=lambda: self.current,
            alloc_pinned_memory=self.alloc_pinned_memory,
            runtime=SimpleNamespace(CUDARuntimeError=self.CUDARuntimeError),
        )
        self.empty = DeviceArray

    def alloc_pinned_memory(self, n_bytes):
        if n_bytes > self.most_pinned:
            raise self.CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        if any(len(memory) == n_bytes for memory in self.free):
            memory = self.free.pop([len(memory) for memory in self.free].index(n_bytes))
        else:
            self.sizes.append(n_bytes)
            memory = bytearray(n_bytes)
            self.memory.append(memory)
        lent = (ctypes.c_char * n_bytes).from_buffer(memory)
        weakref.finalize(lent, self.free.append, memory)
        return lent

    def ascontiguousarray(self, array):
        """Turn an array by a kernel on the current stream."""
        turned = DeviceArray(array.content.shape, array.content.dtype)

        def turn():
            turned.content[...] = array.content

        self.current.queue.append(once(turn))
        return turned

    def read(self, array):
        """Return what a kernel on the current stream would see."""
        for work in self.current.queue:
            work()
        return array.content


def batches(n, shape=(2, 3, 4, 5)):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1 + i % 2, *shape[1:])).astype(np.float32) for i in range(n)]


@pytest.mark.parametrize("ahead", [0, 1, 3, 6])
def test_every_batch_arrives_whole_however_many_are_under_way(ahead):
    device = LazyDevice()
    upload = PinnedUploads(device)
    hosts = batches(9)
    sent = [host.copy() for host in hosts]
    waiting = []
    for host in hosts:
        waiting.append(upload(host))
        host[...] = 7  # the caller may do as it likes with it
        if len(waiting) > ahead:
            expected = sent.pop(0)
            np.testing.assert_array_equal(device.read(waiting.pop(0)()), expected)
    for arrived, expected in zip(waiting, sent, strict=True):
        np.testing.assert_array_equal(device.read(arrived()), expected)
    assert set(device.sizes) == {256, 512}  # powers of two
    assert len(device.sizes) <= 2 * _MOST_COPIES + 2


@pytest.mark.parametrize("ahead", [0, 1, 3, 6])
def test_a_batch_is_put_together_where_it_is_copied_from(ahead):
    """In the order of files, of fewer volumes than there is room for, and turned on the device."""
    device = LazyDevice()
    uploads = PinnedUploads(device)
    expected, waiting = [], []
    for host in batches(9):
        staging = uploads.staging((3, *host.shape[1:]), host.dtype)
        assert staging.host.shape == (3, 3, 4, 5)
        assert staging.host[0].flags.f_contiguous  # as the volumes of files
        staging.host[: len(host)] = host
        waiting.append(staging.send(len(host)))
        expected.append(host)
        del staging  # whoever is next may get this memory, once it has been copied
        gc.collect()
        if len(waiting) > ahead:
            np.testing.assert_array_equal(device.read(waiting.pop(0)()), expected.pop(0))
    for arrived, batch in zip(waiting, expected, strict=True):
        np.testing.assert_array_equal(device.read(arrived()), batch)
    assert set(device.sizes) == {1024}
    assert len(device.sizes) <= _MOST_COPIES + 1


def test_memory_that_somebody_holds_is_nobody_elses():
    uploads = PinnedUploads(LazyDevice())
    kept = uploads.staging((1, 2, 3, 4), np.float32)
    kept.host[...] = 1
    kept.send(1)()
    for _ in range(3 * _MOST_COPIES):
        other = uploads.staging((1, 2, 3, 4), np.float32)
        other.host[...] = 2
        other.send(1)()
        uploads(np.full((1, 2, 3, 4), 3, np.float32))()
    assert (kept.host == 1).all()


def test_the_host_runs_ahead_of_few_copies_and_keeps_none_that_are_done():
    device = LazyDevice()
    upload = PinnedUploads(device)
    host = np.ones((1, 2, 3, 4), np.float32)
    waiting = [upload(host) for _ in range(20)]
    assert len(device.sizes) <= 5
    for arrived in waiting:
        device.read(arrived())
    upload(host)
    gc.collect()
    assert len(device.free) == len(device.sizes) - 1  # all but the latest's


def test_each_device_has_a_stream_of_its_own_that_waits_for_no_other():
    device = LazyDevice()
    upload = PinnedUploads(device)
    arenas = []
    for device.current_device in (0, 1, 0):
        arenas.append(upload(batches(1)[0])().arena)
    assert arenas[0] is arenas[2] is not arenas[1]
    assert all(stream.non_blocking for stream in arenas)  # the null stream's kernels among others


@pytest.mark.parametrize("most_pinned", [10, 10**6])
def test_a_copy_waits_for_the_kernels_that_may_still_use_its_memory(most_pinned):
    device = LazyDevice(most_pinned)
    upload = PinnedUploads(device)
    order = []
    device.current.queue.append(lambda: order.append("kernel"))
    arrived = upload(np.ones((1, 2, 2, 2), np.float32))
    array = arrived()
    lane = upload._lanes[0]
    lane.stream.queue.insert(1, lambda: order.append("copy"))
    lane.stream.record().synchronize()
    assert order == ["kernel", "copy"]
    assert array.arena is lane.stream  # so that memory given back early waits for its copy
    assert (array.content == 1).all()


def test_what_cannot_be_pinned_is_copied_all_the_same():
    device = LazyDevice(most_pinned=10)
    host = batches(1)[0]
    uploads = PinnedUploads(device)
    array = uploads(np.asfortranarray(host))()
    np.testing.assert_array_equal(device.read(array), host)
    staging = uploads.staging(host.shape, host.dtype)
    staging.host[...] = host
    np.testing.assert_array_equal(device.read(staging.send(1)()), host)


@pytest.mark.parametrize("most_pinned", [10, 10**6])
def test_the_uploader_keeps_no_array(most_pinned):
    arrived = PinnedUploads(LazyDevice(most_pinned))(batches(1)[0])
    arrived()
    with pytest.raises(IndexError):
        arrived()

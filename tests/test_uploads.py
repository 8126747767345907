"""Copies to the device, on a device that copies as late as it may."""

from types import SimpleNamespace

import numpy as np
import pytest

from gpuroi.backends._uploads import PinnedUploads


class Stream:
    """Work is done when somebody waits for it, and not before."""

    allocating = None

    def __init__(self, non_blocking=False):
        self.queue = []

    def record(self):
        done = list(self.queue)
        return SimpleNamespace(synchronize=lambda: [work() for work in done])

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

    def set(self, host, stream=None):
        def copy():
            self.content[...] = host

        if stream is None:
            copy()
        else:
            assert host.base is not None  # pinned memory, not what the caller may change
            stream.queue.append(once(copy))


def once(work):
    pending = [work]
    return lambda: pending.pop()() if pending else None


class LazyDevice:
    """As much of CuPy as uploads use."""

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self, most_pinned=10**6):
        self.current = Stream()
        self.most_pinned = most_pinned
        self.n_pinned = 0
        self.cuda = SimpleNamespace(
            Stream=Stream,
            Device=lambda: SimpleNamespace(id=0),
            get_current_stream=lambda: self.current,
            alloc_pinned_memory=self.alloc_pinned_memory,
            runtime=SimpleNamespace(CUDARuntimeError=self.CUDARuntimeError),
        )
        self.empty = DeviceArray

    def alloc_pinned_memory(self, n_bytes):
        if n_bytes > self.most_pinned:
            raise self.CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        self.n_pinned += 1
        return bytearray(n_bytes)

    def read(self, array):
        """Return what a kernel on the current stream would see."""
        for work in self.current.queue:
            work()
        return array.content


def batches(n, shape=(2, 3, 4, 5)):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1 + i % 2, *shape[1:])).astype(np.float32) for i in range(n)]


@pytest.mark.parametrize("ahead", [0, 1, 3])
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
    assert device.n_pinned <= 4  # two buffers, each made larger once


def test_a_copy_waits_for_the_kernels_that_may_still_use_its_memory():
    device = LazyDevice()
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
    array = PinnedUploads(device)(np.asfortranarray(host))()
    np.testing.assert_array_equal(array.content, host)


def test_the_uploader_keeps_no_array():
    arrived = PinnedUploads(LazyDevice())(batches(1)[0])
    arrived()
    with pytest.raises(IndexError):
        arrived()

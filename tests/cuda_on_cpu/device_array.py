"""An array library that forgives as little as a device does.

Its arrays live in the memory of the host, but refuse every silent way there: `float(x)`, `if x`,
iteration, NumPy's functions, NumPy's arrays among operands. Only `get` reads them, and is counted.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from scipy import ndimage

_METHODS = {"astype", "reshape", "ravel", "view", "transpose"}
_METHODS |= {"sum", "min", "max", "any", "all", "copy"}
_ATTRIBUTES = {"shape", "dtype", "size", "ndim", "nbytes", "itemsize"}
_UPLOADS = {"asarray", "ascontiguousarray", "array"}


class DeviceArray(NDArrayOperatorsMixin):
    """A NumPy array behind a door."""

    n_reads = 0

    def __init__(self, host):
        self._host = host

    def get(self):
        """Return a copy on the host; on a device this waits."""
        DeviceArray.n_reads += 1
        return self._host.copy()

    def set(self, host, stream=None):
        """Fill the array from contiguous memory of the host."""
        assert host.flags.c_contiguous
        self._host[...] = host

    def __getattr__(self, name):
        if name in _ATTRIBUTES:
            return getattr(self._host, name)
        if name in _METHODS:
            return _on_device(getattr(self._host, name))
        raise AttributeError(name)

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        return _on_device(getattr(ufunc, method))(*inputs, **options)

    def __len__(self):
        return len(self._host)

    def __getitem__(self, index):
        return _behind_door(self._host[_unpacked(index)])

    def __setitem__(self, index, value):
        self._host[_unpacked(index)] = _unpacked(value)

    def __iter__(self):
        return (self[place] for place in range(len(self)))

    def _refuse(self, *_, **__):
        raise TypeError("a device array is read by the host without get()")

    __array__ = __float__ = __int__ = __index__ = __bool__ = __complex__ = _refuse


def _behind_door(value):
    if isinstance(value, np.ndarray | np.generic):
        return DeviceArray(np.asarray(value) if isinstance(value, np.generic) else value)
    if isinstance(value, tuple):
        return tuple(map(_behind_door, value))
    return value


def _unpacked(value):
    if isinstance(value, DeviceArray):
        return value._host
    if isinstance(value, tuple | list):
        return type(value)(map(_unpacked, value))
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError("an array of the host among those of a device")
    return value


def _on_device(function):
    """Return `function` for device arrays."""

    def run(*arguments, **options):
        options = {name: _unpacked(value) for name, value in options.items()}
        return _behind_door(function(*_unpacked(arguments), **options))

    return run


class _Stream(nullcontext):
    """A stream, and its events: all work is done at once."""

    done = True

    def record(self):
        return self

    def wait_event(self, event):
        pass

    synchronize = record


class _Cuda:
    """As much of `cupy.cuda` as uploads use."""

    runtime = SimpleNamespace(CUDARuntimeError=RuntimeError)
    alloc_pinned_memory = bytearray

    def Stream(self, non_blocking):
        return _Stream()

    def Device(self):
        return SimpleNamespace(id=0)

    def get_current_stream(self):
        return _Stream()


class _Namespace:
    """NumPy's functions for device arrays, as CuPy has them."""

    cuda = _Cuda()

    def __getattr__(self, name):
        attribute = getattr(np, name)
        if isinstance(attribute, type | np.ufunc):  # ufuncs ask the array
            return attribute
        if name in _UPLOADS:
            return lambda array: DeviceArray(
                attribute(array._host)
                if isinstance(array, DeviceArray)
                else attribute(array).copy()
            )
        return _on_device(attribute)


#: In the place of `cupy` and `cupyx.scipy.ndimage`.
xp = _Namespace()
filters = SimpleNamespace(
    # The structuring element comes from the host, as with CuPy.
    label=lambda array, structure: _on_device(
        lambda foreground: ndimage.label(foreground, structure)
    )(array),
    maximum_filter=_on_device(ndimage.maximum_filter),
)


def unpacking(compiler):
    """Return a compiler of kernels whose launches take device arrays."""

    def compile_source(source, options):
        module = compiler(source, options)

        def get_function(name):
            kernel = module.get_function(name)
            return lambda blocks, threads, arguments: kernel(blocks, threads, _unpacked(arguments))

        return SimpleNamespace(get_function=get_function)

    return compile_source

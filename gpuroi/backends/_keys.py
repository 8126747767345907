"""Integer keys that sort as floats do.

Device compilers flush denormals to zero when they compare floats (CuPy compiles with
``-ftz=true``), so a GPU compares the bits instead. Values are NumPy or CuPy arrays without NaN.
"""

from types import ModuleType

import numpy as np

from gpuroi.types import Array, Tail

_INTEGER = {"float32": "int32", "float64": "int64"}


def bits(values: Array) -> Array:
    """Return the bits of `values` as signed integers: negative where the sign bit is set."""
    return values.view(_INTEGER[values.dtype.name])


def magnitude(values: Array) -> Array:
    """Return keys in the order of ``abs(values)``; they are the bits of the magnitudes."""
    integer = bits(values)
    return integer & np.iinfo(integer.dtype).max


def ordered(xp: ModuleType, values: Array) -> Array:
    """Return keys in the order of `values`, -0.0 before 0.0; `from_ordered` takes them back."""
    return _flip_negative(xp, bits(values))


def from_ordered(xp: ModuleType, keys: Array, dtype: str) -> Array:
    """Return the values whose `ordered` keys are given."""
    return _flip_negative(xp, keys).view(dtype)


def reaches(xp: ModuleType, maps: Array, cutoffs: Array, tail: Tail) -> Array:
    """Return where `maps` ``(B, X, Y, Z)`` reach `cutoffs` ``(B,)``, magnitudes above zero."""
    at_cutoff = magnitude(maps) >= bits(xp.asarray(cutoffs)).reshape(-1, 1, 1, 1)
    if tail == "both":
        return at_cutoff
    is_negative = bits(maps) < 0
    return at_cutoff & (is_negative if tail == "negative" else ~is_negative)


def _flip_negative(xp: ModuleType, integer: Array) -> Array:
    # Magnitudes of negative floats grow away from zero; flipping all bits but the sign mirrors
    # them, and mirrors them back.
    return xp.where(integer < 0, integer ^ np.iinfo(integer.dtype).max, integer)

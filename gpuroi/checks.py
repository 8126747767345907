"""What parameters may be, and what error messages say of those that are not."""

import math
import numbers
from typing import Any

_NUMPY_BOOLS = ("bool", "bool_")


def shown(value: object) -> str:
    """Return what an error message shows of `value`: its repr, cut short."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_choice(name: str, value: Any, accepted: tuple[Any, ...]) -> Any:
    """Return `value` if it is one of `accepted`; `name` is the parameter it was passed as."""
    # NumPy's truth values, which are no Integral: without NumPy, which `--help` does not load.
    is_scalar = isinstance(value, str | numbers.Integral) or type(value).__name__ in _NUMPY_BOOLS
    if not is_scalar or value not in accepted:
        choices = ", ".join(repr(choice) for choice in accepted)
        raise ValueError(f"{name}={shown(value)} is not one of {choices}.")
    return accepted[accepted.index(value)]  # not NumPy's number that equals it


def at_least_zero(parameter: str, value: float, unit: str) -> float:
    """Return `value` if it is a finite number >= 0; `parameter` and `unit` are for messages."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{parameter}={shown(value)} is a {type(value).__name__}; pass a number of {unit} >= 0."
        )
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{parameter}={value!r} is not a finite number >= 0 (in {unit}).")
    return float(value)


def at_least_one(parameter: str, value: int, unit: str) -> int:
    """Return `value` if it is an integer >= 1; `parameter` and `unit` are for messages."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"{parameter}={shown(value)} is a {type(value).__name__}; pass a number of {unit} >= 1."
        )
    if value < 1:
        raise ValueError(f"{parameter}={value!r} is not a number of {unit} >= 1.")
    return int(value)

"""Numbers that callers give, of whatever type they are."""

from __future__ import annotations

import math
from numbers import Integral, Real


def as_float(value: object) -> float:
    """A real number as a float.

    Returns:
        NaN for what is no real number, not finite, or beyond a float's range; booleans are none.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def is_integer(value: object, least: int = 1, most: int = 2**63 - 1) -> bool:
    """Whether it is a whole number in a range, both ends included; booleans are none."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and least <= int(value) <= most  # type: ignore[call-overload]

"""Validation of numbers from callers, of any type."""

from __future__ import annotations

import math
from numbers import Integral, Real


def as_float(value: object) -> float:
    """Convert a real number to a float.

    Returns:
        NaN for booleans, values that are not real numbers, infinities and numbers too large.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def is_integer(value: object, least: int = 1, most: int = 2**63 - 1) -> bool:
    """Whether a value is an integer, and not a boolean, from ``least`` to ``most`` inclusive."""
    is_number = isinstance(value, Integral) and not isinstance(value, bool)
    return is_number and least <= int(value) <= most  # type: ignore[call-overload]

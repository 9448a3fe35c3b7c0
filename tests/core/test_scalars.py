"""Numbers of every kind that callers give."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from customize.core.scalars import as_float, is_integer

NO_NUMBERS = [
    *(math.nan, math.inf, -math.inf, 10**400, -(10**400), 10**5000, Fraction(10**400), True),
    *(None, "1", b"1", 1j, [], {}, object(), Decimal("1"), Decimal("sNaN")),
    *(np.float64("nan"), np.array(0.5), np.array([0.5, 1.0]), torch.tensor(0.5)),
]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: type(value).__name__)
def test_values_that_are_not_finite_numbers_become_nan(value):
    assert math.isnan(as_float(value))
    assert not is_integer(value, -(10**9), 10**9)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**70), 2**70))
def test_numbers_are_converted_exactly(number):
    assert as_float(number) == float(number)
    assert as_float(np.float64(number)) == float(number)


def test_integers_are_checked_against_a_range():
    assert is_integer(1) and is_integer(np.int64(7)) and is_integer(2**63 - 1) and is_integer(0, 0)
    assert (
        not is_integer(0) and not is_integer(2**63) and not is_integer(1.0) and not is_integer(-1)
    )

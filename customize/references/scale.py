"""Scales of references."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from customize.core.scalars import as_float
from customize.errors import ConfigError
from customize.text import quote

SCALE_ARGUMENT = "reference_scale"
#: The largest scale of references.
MAX_SCALE = 2.0


def read_scale(value: Any, where: str = SCALE_ARGUMENT) -> float:
    """Read one scale.

    Args:
        value: What a user gave.
        where: Name of the argument in messages.

    Raises:
        ConfigError: It is no number from 0 to :data:`MAX_SCALE`.
    """
    number = as_float(value)
    if math.isnan(number) or not 0.0 <= number <= MAX_SCALE:
        raise ConfigError(
            f"invalid scale of references {quote(value)}",
            where=where,
            fix=f"give a number from 0 to {MAX_SCALE:g}",
        )
    return number


def check_scales(scales: Mapping[str, Any]) -> None:
    """Refuse numbers out of range in a nested dict of scales by block."""
    for value in scales.values():
        if isinstance(value, Mapping):
            check_scales(value)
        else:
            for number in value if isinstance(value, list | tuple) else [value]:
                read_scale(number)

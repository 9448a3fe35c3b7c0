"""Layer inputs that are recorded faster than by default."""

from __future__ import annotations

import inspect

import pytest

from customize.concepts.input_statistics import record_layer_inputs


def record_in_one_step(patch: pytest.MonkeyPatch) -> None:
    """Draw the pictures of recordings in one step; the default takes eight times as long."""
    patch.setitem(inspect.unwrap(record_layer_inputs).__kwdefaults__, "steps", 1)

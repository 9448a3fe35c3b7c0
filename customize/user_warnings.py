"""Warnings that point at the user's line, however deep in this package they are raised."""

from __future__ import annotations

import inspect
import warnings

_SKIPPED = ("customize", "contextlib", "functools")


def warn_user(message: str) -> None:
    """Warn at the innermost line of the stack that is outside this package."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in _SKIPPED:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)

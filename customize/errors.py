"""The one exception family of the pack: what was wrong, where, and what to do about it."""

from __future__ import annotations

import errno
from pathlib import Path

from customize.text import one_line, shortened

#: Most characters of what was wrong and of what to do, and of where.
MAX_WHAT, MAX_WHERE = 2000, 1000

__all__ = [
    "ConceptError",
    "ConfigError",
    "CustomizeError",
    "DataError",
    "PipelineError",
    "SettingsError",
    "StorageError",
    "TrainingError",
    "TrainingStopped",
]


class CustomizeError(Exception):
    """Base of every error that the pack raises on purpose.

    Args:
        what: What was wrong, as a sentence without its full stop.
        where: The file, key, layer or argument concerned; kept as text, so that an error holds no
            model alive and can always be sent between processes.
        fix: What the reader can do, as an order ("pass rank=8").
    """

    def __init__(self, what: str, *, where: object | None = None, fix: str | None = None) -> None:
        # Only `what` goes to Exception.args: unpickling calls the class with args and then restores
        # the attributes, so subclasses need no pickling code of their own.
        what = shortened(what, MAX_WHAT)
        super().__init__(what)
        self.what = what
        self.where = None if where is None else shortened(str(where), MAX_WHERE)
        self.fix = None if fix is None else shortened(fix, MAX_WHAT)

    def __str__(self) -> str:
        text = _sentence(self.what)
        if self.where:
            text += f" ({shortened(one_line(self.where), MAX_WHERE)})"
        if not text.endswith(("!", "?")):
            text += "."
        if self.fix:
            text += f" Do: {_sentence(self.fix)}."
        return text


class ConfigError(CustomizeError):
    """A setting, argument or configuration file is unknown, malformed or contradicts another."""


class DataError(CustomizeError):
    """Training images, masks or captions are missing, unreadable or unusable."""


class ConceptError(CustomizeError):
    """A concept file is unreadable, has wrong keys or shapes, or belongs to another base."""


class PipelineError(CustomizeError):
    """A pipeline cannot host what was asked: unknown family, missing part, conflicting state."""


class TrainingError(CustomizeError):
    """Training cannot go on: a loss that is not finite, a checkpoint that does not fit."""


class TrainingStopped(TrainingError):
    """Training was stopped from outside (Ctrl-C, SIGTERM), after saving a checkpoint."""


class SettingsError(TrainingError):
    """What is in the output folder, a concept or a checkpoint, was made with other settings."""


class StorageError(CustomizeError):
    """Output cannot be written: full disk, no permission, a folder that holds something else."""


def storage_error(error: OSError, where: Path) -> StorageError:
    """What the system says on writing, as an error of the pack."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return StorageError(
        "the disk is full" if full else f"it cannot be written: {error.strerror or error}",
        where=where,
        fix="free some space and save again" if full else "choose a place that can be written",
    )


def _sentence(text: str) -> str:
    # Again, as an escape is longer than the character that it stands for.
    return shortened(one_line(text).rstrip(". "), MAX_WHAT)

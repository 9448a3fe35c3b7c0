"""The one exception family of the pack: what was wrong, where, and what to do about it."""

from __future__ import annotations

import errno
import os
import re

from customize.text import one_line, shorten

#: Most characters of what was wrong and of what to do, and of where.
MAX_MESSAGE_LENGTH, MAX_LOCATION_LENGTH = 2000, 1000

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
        what = shorten(what, MAX_MESSAGE_LENGTH)
        super().__init__(what)
        self.what = what
        self.where = None if where is None else shorten(str(where), MAX_LOCATION_LENGTH)
        self.fix = None if fix is None else shorten(fix, MAX_MESSAGE_LENGTH)

    def __str__(self) -> str:
        text = _sentence(self.what)
        if self.where:
            text += f" ({shorten(one_line(self.where), MAX_LOCATION_LENGTH)})"
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


#: errno -> what it means for what is written, and what to do about it.
DISK_ERRORS = {
    errno.ENOSPC: ("the disk is full", "free some space, and run again"),
    errno.EDQUOT: ("the disk is full: the quota is used up", "free some space, and run again"),
    errno.EFBIG: (
        "the disk is full, or a limit on the size of files is reached",
        "free some space or raise the limit, and run again",
    ),
    errno.EROFS: ("the disk is read-only", "choose a place that can be written"),
}


def system_errno(error: BaseException) -> int | None:
    """The system's number for why a file could not be written; None for any other error.

    Libraries wrap it: safetensors and tokenizers write "(os error 28)" into errors of their own.
    """
    if isinstance(error, OSError):
        return error.errno
    code = re.search(r"\(os error (\d+)\)", str(error))
    if code is not None:
        return int(code[1])
    full = re.search(r"No space left on device|disk is full|Disk quota exceeded", str(error))
    return errno.ENOSPC if full else None


def storage_error(
    error: BaseException, where: object, what: str = "", fix: str = ""
) -> StorageError:
    """What the system says on writing, as an error of the pack.

    Args:
        error: an ``OSError``, or one for which :func:`system_errno` gives a number.
        what: what cannot be written, such as "the checkpoint of step 10".
        fix: what to do where the disk is neither full nor read-only.
    """
    code = system_errno(error)
    reason, advice = DISK_ERRORS.get(code or 0, ("", ""))
    if reason and not what:
        return StorageError(reason, where=where, fix=advice)
    strerror = error.strerror if isinstance(error, OSError) else os.strerror(code or 0)
    return StorageError(
        f"{what or 'it'} cannot be written: {reason or strerror or error}",
        where=where,
        fix=advice or fix or "choose a place that can be written",
    )


def _sentence(text: str) -> str:
    # Again, as an escape is longer than the character that it stands for.
    return shorten(one_line(text).rstrip(". "), MAX_MESSAGE_LENGTH)

"""The package's exception classes: each error has a problem, its location and a fix."""

from __future__ import annotations

import errno
import os
import re

from customize.text import one_line, shorten

#: Maximum number of characters of the problem and of the fix, and of the location.
MAX_MESSAGE_LENGTH, MAX_LOCATION_LENGTH = 2000, 1000

__all__ = [
    "ConceptError",
    "ConfigError",
    "CustomizeError",
    "DataError",
    "EndpointError",
    "PipelineError",
    "SettingsError",
    "StorageError",
    "TrainingError",
    "TrainingStopped",
]


class CustomizeError(Exception):
    """Base class of all errors that the package raises deliberately.

    Args:
        problem: What is wrong, as a sentence without its full stop.
        where: The file, key, layer or argument concerned. It is stored as text, so that the error
            keeps no model alive and can be pickled.
        fix: What the user can do, in the imperative ("pass rank=8").
    """

    def __init__(
        self, problem: str, *, where: object | None = None, fix: str | None = None
    ) -> None:
        # Only `problem` goes to Exception.args: unpickling calls the class with args and then
        # restores the attributes, so subclasses need no pickling code.
        problem = shorten(problem, MAX_MESSAGE_LENGTH)
        super().__init__(problem)
        self.problem = problem
        self.where = None if where is None else shorten(str(where), MAX_LOCATION_LENGTH)
        self.fix = None if fix is None else shorten(fix, MAX_MESSAGE_LENGTH)

    def __str__(self) -> str:
        text = _format_sentence(self.problem)
        if self.where:
            text += f" ({shorten(one_line(self.where), MAX_LOCATION_LENGTH)})"
        if not text.endswith(("!", "?")):
            text += "."
        if self.fix:
            fix = _format_sentence(self.fix)
            text += f" Fix: {fix}" + ("" if fix.endswith(("!", "?")) else ".")
        return text


class ConfigError(CustomizeError):
    """A setting, argument or configuration file is unknown, malformed or contradicts another."""


class DataError(CustomizeError):
    """Training images, masks or captions are missing, unreadable or unusable."""


class ConceptError(CustomizeError):
    """A concept file is unreadable, has wrong keys or shapes, or belongs to another base."""


class PipelineError(CustomizeError):
    """A pipeline does not support the request: unknown family, missing component, or conflict."""


class EndpointError(CustomizeError):
    """An endpoint cannot be reached, refuses the request, or answers something else."""


class TrainingError(CustomizeError):
    """Training cannot continue: the loss is not finite, or a checkpoint does not match."""


class TrainingStopped(TrainingError):
    """Training was interrupted (Ctrl-C, SIGTERM) after saving a checkpoint."""


class SettingsError(TrainingError):
    """The output folder contains a concept or checkpoint made with different settings."""


class StorageError(CustomizeError):
    """Output cannot be written: full disk, missing permission, or a folder with other files."""


#: errno -> (problem, fix) for errors of writing.
DISK_ERRORS = {
    errno.ENOSPC: ("the disk is full", "free some space, and run again"),
    errno.EDQUOT: ("the disk is full: the quota is used up", "free some space, and run again"),
    errno.EFBIG: (
        "the disk is full, or a limit on the size of files is reached",
        "free some space or raise the limit, and run again",
    ),
    errno.EROFS: ("the disk is read-only", "choose a writable location"),
}


def system_errno(error: BaseException) -> int | None:
    """Return the errno of an error of writing, or None for any other error.

    safetensors and tokenizers raise their own exceptions with "(os error 28)" in the message.
    """
    if isinstance(error, OSError):
        return error.errno
    code = re.search(r"\(os error (\d+)\)", str(error))
    if code is not None:
        return int(code[1])
    full = re.search(r"No space left on device|disk is full|Disk quota exceeded", str(error))
    return errno.ENOSPC if full else None


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its class if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def storage_error(
    error: BaseException, where: object, output: str = "", fix: str = ""
) -> StorageError:
    """Convert an error of writing to a :class:`StorageError`.

    Args:
        error: An ``OSError``, or an error for which :func:`system_errno` returns a number.
        where: The file or folder.
        output: Name of the output, such as "the checkpoint of step 10".
        fix: The fix where the disk is neither full nor read-only.
    """
    code = system_errno(error)
    reason, advice = DISK_ERRORS.get(code or 0, ("", ""))
    if reason and not output:
        return StorageError(reason, where=where, fix=advice)
    strerror = error.strerror if isinstance(error, OSError) else os.strerror(code or 0)
    return StorageError(
        f"{output or 'it'} cannot be written: {reason or strerror or error}",
        where=where,
        fix=advice or fix or "choose a writable location",
    )


def _format_sentence(text: str) -> str:
    # Shortened again because escape sequences are longer than the characters they replace.
    return shorten(one_line(text).rstrip(". "), MAX_MESSAGE_LENGTH)

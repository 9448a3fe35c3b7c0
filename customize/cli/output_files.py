"""Files that commands write: checks before the work begins, atomic JSON, storage errors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from customize.atomic import write_atomic
from customize.errors import ConfigError, StorageError, storage_error, system_errno


def check_output_file(path: Path | None) -> None:
    """Check that a file can be written; None is valid.

    Raises:
        StorageError: The path is a folder, or its parent is not writable.
    """
    if path is None:
        return
    from customize.concepts.io.output_folder import check_writable

    if os.path.isdir(path):
        raise StorageError("the path is a folder", where=path, fix="name a file")
    check_writable(path.parent)


def check_png(path: Path | None, flag: str) -> None:
    """Check that a path names a .png in an existing folder; None is valid.

    Raises:
        ConfigError: The suffix differs, or the folder does not exist.
    """
    if path is not None and path.suffix.lower() != ".png":
        raise ConfigError(
            f"{path} does not end in .png", where=flag, fix=f"name it {path.stem}.png"
        )
    if path is not None and not os.path.isdir(path.absolute().parent):
        raise ConfigError(f"the folder {path.parent} does not exist", where=flag, fix="create it")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON atomically, over an existing file.

    Raises:
        StorageError: The file cannot be written.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Raise operating system errors as :class:`customize.errors.StorageError`."""
    try:
        yield
    except Exception as error:
        if system_errno(error) is None:
            raise
        raise storage_error(error, where) from error

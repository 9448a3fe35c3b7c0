"""Checks of the folder that a concept, merge or run is to be written to, before work starts."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from customize.atomic import is_partial
from customize.concepts.io.file_layout import INFO_FILE, TRAINING_FILES
from customize.concepts.io.read_concept import load_concept, read_info
from customize.errors import ConceptError, StorageError, storage_error


def check_output_folder(folder: Path, name: str) -> None:
    """Refuse a folder that a concept of this name must not be written to.

    A folder may be new, be empty except for the files of training runs, or contain a concept of the
    same name.

    Raises:
        StorageError: If the folder contains other files, or cannot be listed.
    """
    names = list_output(folder)
    if INFO_FILE in names:
        check_same_name(folder, name)
    elif not names <= set(TRAINING_FILES):
        raise StorageError(
            "the folder holds other files", where=folder, fix="choose a new or empty folder"
        )


def list_output(folder: Path) -> set[str]:
    """Return the names in an output folder, without those of partial files; none if it is new.

    Raises:
        StorageError: If it is a file, or cannot be listed.
    """
    try:
        return {path.name for path in folder.iterdir() if not is_partial(path.name)}
    except FileNotFoundError:
        return set()
    except NotADirectoryError as error:
        raise StorageError(
            "the output folder is a file", where=folder, fix="choose another name"
        ) from error
    except OSError as error:
        raise storage_error(error, folder) from error


def check_same_name(path: Path, name: str) -> None:
    """Refuse to overwrite a concept's folder or file unless it contains a concept of this name.

    Raises:
        StorageError: If another concept is in the folder or file, or it cannot be read.
    """
    try:
        existing = read_info(path).name if path.is_dir() else load_concept(path).info.name
    except ConceptError as error:
        raise StorageError(
            f"the path holds something that cannot be read as a concept: {error.problem}",
            where=path,
            fix="move it away, or choose another name",
        ) from error
    if existing != name:
        raise StorageError(
            f"the path holds the concept {existing}; writing {name} would overwrite it",
            where=path,
            fix="choose another name, or move it away",
        )


def make_folder(folder: Path) -> None:
    """Create a folder and its parents; an existing folder stays unchanged.

    Raises:
        StorageError: If the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error


def check_writable(folder: Path) -> None:
    """Check that a folder can be created or written to, without leaving anything behind.

    Raises:
        StorageError: If permission is missing, the disk is full or read-only, or a
            parent is not a folder.
    """
    nearest = folder
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    # The name is that of a partial file, so that a leftover is swept.
    probe = nearest / f".trial.{secrets.token_hex(4)}.partial"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise storage_error(error, folder) from error

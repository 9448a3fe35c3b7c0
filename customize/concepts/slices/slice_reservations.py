"""Claims: slices that runs hold whose concept isn't written yet.

A run writes ``.slice.json`` into its output folder before its first step, and takes it away when
the concept is there, which then holds the slice. A run that was cut off leaves its claim, so that
nobody else takes the slice that it will go on with; deleting the folder gives it up.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from customize.atomic import write_atomic
from customize.concepts.concept_info import NAME_PATTERN, BasisInfo, check_slices
from customize.concepts.io.file_layout import RESERVATION_FILE
from customize.concepts.io.find_files import find_in_subfolders
from customize.concepts.io.read_concept import read_info
from customize.errors import ConceptError, storage_error
from customize.safe_read import MAX_TEXT_BYTES, read_bytes

LOCK_FILE = ".slices.lock"


class SliceReservation(BaseModel):
    """What a run holds, as it stands in ``.slice.json``.

    Attributes:
        name: of the concept that is learned.
        basis, rank, slices: as :class:`customize.concepts.concept_info.ConceptInfo` will have them.
        index: the concept's number, which gives the slices; None where its name does.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=rf"^{NAME_PATTERN}$")
    basis: BasisInfo
    rank: int = Field(ge=1, le=2**20)
    index: int | None = Field(None, ge=0)
    slices: dict[str, list[int]]

    @model_validator(mode="after")
    def _slices_fit(self) -> SliceReservation:
        check_slices(self.slices, self.rank, self.basis)
        return self


def read_reservations(library: Path) -> list[SliceReservation]:
    """The claims of all runs in a library of concept folders, but for those of concepts that are
    written by now: a run that was stopped after that leaves one, until it is started again.

    Raises:
        ConceptError: one cannot be read. It may hold columns.
    """
    # Not in hidden folders, as with concepts.
    found = {path: _read(path) for path in find_in_subfolders(Path(library), RESERVATION_FILE)}
    return [claim for path, claim in found.items() if not _is_fulfilled(claim, path.parent)]


def write_reservation(claim: SliceReservation, folder: Path) -> None:
    """Put a claim into a run's output folder, over an older one, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    data = claim.model_dump_json(indent=2).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / RESERVATION_FILE, data, folder=folder.parent)
    except OSError as error:
        raise storage_error(error, folder) from error


def delete_fulfilled_reservation(folder: Path) -> None:
    """:func:`delete_reservation`, if the concept in the folder holds what the claim is on."""
    path = folder / RESERVATION_FILE
    if path.is_file() and _is_fulfilled(_read(path), folder):
        delete_reservation(folder)


def _is_fulfilled(claim: SliceReservation, folder: Path) -> bool:
    """Whether the concept is in the folder that the claim was made for."""
    try:
        info = read_info(folder)
    except ConceptError:
        return False
    held = {width: list(columns) for width, columns in info.slices.items()}
    return (info.name, info.basis, held) == (claim.name, claim.basis, claim.slices)


def delete_reservation(folder: Path) -> None:
    """Take a run's claim away.

    Raises:
        StorageError: it cannot be deleted.
    """
    try:
        (folder / RESERVATION_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error


@contextmanager
def lock_library(library: Path) -> Iterator[None]:
    """Keep other processes from choosing a slice in a library while one is chosen and claimed.

    The system frees the lock when the process ends, however it ends. A library that may not be
    written in is read without one: this process claims nothing there.

    Raises:
        StorageError: the library is no folder and cannot become one.
    """
    from filelock import FileLock

    lock = FileLock(library / LOCK_FILE, mode=0o664)
    try:
        library.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        # One that is not there cannot be read either.
        forbidden = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        if not forbidden or not os.path.isdir(library):
            raise storage_error(error, library) from error
    try:
        yield
    finally:
        lock.release()


def _read(path: Path) -> SliceReservation:
    try:
        return SliceReservation.model_validate_json(read_bytes(path, MAX_TEXT_BYTES), strict=True)
    except (OSError, ValidationError) as error:
        raise ConceptError(
            "the claim of a run on its slice cannot be read",
            where=path,
            fix="delete its folder if that run is not to go on",
        ) from error

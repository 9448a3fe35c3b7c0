"""Slice reservations of training runs whose concept is not written yet.

A run writes ``.slice.json`` into its output folder before its first step, and deletes it when the
concept, which then owns the slice, is written. An interrupted run leaves its reservation, so that
no other run reserves the slice before it resumes; deleting the folder releases the slice.
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
    """The slice that a run has reserved, as stored in ``.slice.json``.

    Attributes:
        name: Name of the concept to be trained.
        basis: Basis of the slices.
        rank: Rank of the slices.
        index: Number of the concept in its library; None if its name determines the slices.
        slices: Input width, as text -> columns.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=rf"^{NAME_PATTERN}$")
    basis: BasisInfo
    rank: int = Field(ge=1, le=2**20)
    index: int | None = Field(None, ge=0)
    slices: dict[str, list[int]]

    @model_validator(mode="after")
    def _check_slices(self) -> SliceReservation:
        check_slices(self.slices, self.rank, self.basis)
        return self


def read_reservations(library: Path) -> list[SliceReservation]:
    """The reservations of all runs in a library whose concept is not written yet.

    A run that was stopped just after writing its concept leaves a fulfilled reservation.

    Raises:
        ConceptError: If a reservation cannot be read; it may own columns.
    """
    reservations = {
        path: _read_reservation(path)
        for path in find_in_subfolders(Path(library), RESERVATION_FILE)
    }
    return [r for path, r in reservations.items() if not _is_fulfilled(r, path.parent)]


def write_reservation(reservation: SliceReservation, folder: Path) -> None:
    """Write a reservation into a run's output folder, atomically.

    Raises:
        StorageError: If it cannot be written.
    """
    data = reservation.model_dump_json(indent=2).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / RESERVATION_FILE, data, folder=folder.parent)
    except OSError as error:
        raise storage_error(error, folder) from error


def delete_fulfilled_reservation(folder: Path) -> None:
    """Delete the reservation of a folder whose concept owns the reserved slice."""
    path = folder / RESERVATION_FILE
    if path.is_file() and _is_fulfilled(_read_reservation(path), folder):
        delete_reservation(folder)


def _is_fulfilled(reservation: SliceReservation, folder: Path) -> bool:
    """Whether the folder contains the concept with the reserved slice."""
    try:
        info = read_info(folder)
    except ConceptError:
        return False
    owned = (info.name, info.basis, {width: list(c) for width, c in info.slices.items()})
    return owned == (reservation.name, reservation.basis, reservation.slices)


def delete_reservation(folder: Path) -> None:
    """Delete the reservation in a run's output folder.

    Raises:
        StorageError: If it cannot be deleted.
    """
    try:
        (folder / RESERVATION_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error


@contextmanager
def lock_library(library: Path) -> Iterator[None]:
    """Hold the library's lock while a slice is chosen and reserved.

    The system releases the lock when the process ends. A read-only library is read without a lock,
    because nothing is reserved there.

    Raises:
        StorageError: If the library is not a folder and cannot be created.
    """
    from filelock import FileLock

    lock = FileLock(library / LOCK_FILE, mode=0o664)
    try:
        library.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        # A read-only library must exist.
        is_read_only = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        if not is_read_only or not os.path.isdir(library):
            raise storage_error(error, library) from error
    try:
        yield
    finally:
        lock.release()


def _read_reservation(path: Path) -> SliceReservation:
    try:
        return SliceReservation.model_validate_json(read_bytes(path, MAX_TEXT_BYTES), strict=True)
    except (OSError, ValidationError) as error:
        raise ConceptError(
            "the slice reservation of a training run cannot be read",
            where=path,
            fix="delete its folder if the run will not be resumed",
        ) from error

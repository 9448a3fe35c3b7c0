"""Writing files and folders atomically, and sweeping what killed processes left behind.

What is written has a hidden name beside its target until it is complete. A process that is killed
leaves it there, of full size, so the next one that writes into the folder deletes it. Whether its
writer lives is known by a lock, which the system frees when a process ends, however it ends.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # on Windows: nothing is locked, and nothing is swept
    fcntl = None  # type: ignore[assignment]

_PARTIAL = re.compile(r"\..*\.[0-9a-f]{8}\.partial", re.DOTALL)
# Seconds for which nothing is swept: a partial file exists for a moment before it is locked.
_FRESH = 2.0
# Bytes of the target's name in that of its partial file, which may have 255 in all.
_NAME_BYTES = 100
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EOPNOTSUPP)


def is_partial(name: str) -> bool:
    """Whether a name is that of a file or folder that is being written, or of a leftover."""
    return _PARTIAL.fullmatch(name) is not None


@contextmanager
def atomic_file(path: Path, *, folder: Path | None = None, new: bool = False) -> Iterator[BinaryIO]:
    """A file to write into, which takes its target's place at the end, on the disk itself.

    After an error there is what was there before, and no partial file.

    Args:
        path: the target; its folder must exist.
        folder: where the partial file lies meanwhile, on the same disk; None: beside the target.
        new: refuse to replace an older file.

    Raises:
        OSError: it cannot be written; or it is there already, where it must be ``new``.
    """
    partial = _hidden(path, folder)
    lock = None
    try:
        with open(partial, "xb") as file:
            lock = _locked(partial)
            yield file
            file.flush()
            os.fsync(file.fileno())
        if new:
            _place_new(partial, path)
        else:
            os.replace(partial, path)
        fsync_folder(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink()
        _unlock(lock)


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """A new folder beside a target, to be filled and renamed to it; at the end it is gone.

    Raises:
        OSError: it cannot be made.
    """
    partial = _hidden(path)
    lock = None
    try:
        partial.mkdir(parents=True)
        lock = _locked(partial)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _unlock(lock)


def write_atomic(path: Path, data: bytes, *, folder: Path | None = None, new: bool = False) -> None:
    """Write a file atomically, see :func:`atomic_file`."""
    with atomic_file(path, folder=folder, new=new) as file:
        file.write(data)


def write_new_file(path: Path, data: bytes) -> None:
    """Write a new file to the disk itself; FileExistsError where there is one."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Make renames and new files in a folder outlast a power cut."""
    if os.name != "posix":  # elsewhere a folder cannot be opened, and renames are durable
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:  # some file systems cannot do it
            raise
    finally:
        os.close(descriptor)


def delete_leftovers(folder: Path) -> None:
    """Delete what killed processes left half written in a folder; what cannot be deleted stays."""
    with suppress(OSError):
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if is_partial(name) and _is_left(path):
                if os.path.isdir(path):
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with suppress(OSError):
                        os.unlink(path)


def _is_left(path: str) -> bool:
    """Whether nobody writes to it any more."""
    try:
        status = os.lstat(path)
        kind = stat.S_IFMT(status.st_mode)
        if fcntl is None or kind not in (stat.S_IFREG, stat.S_IFDIR):
            return False
        if abs(time.time() - status.st_mtime) < _FRESH:
            return False
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
    except OSError:  # locked, gone, or where locks don't work, so that it cannot be known
        return False
    return True


def _hidden(path: Path, folder: Path | None = None) -> Path:
    folder = path.parent if folder is None else folder
    delete_leftovers(folder)
    start = os.fsdecode(os.fsencode(path.name)[:_NAME_BYTES])
    return folder / f".{start}.{secrets.token_hex(4)}.partial"


def _locked(partial: Path) -> int | None:
    """A descriptor that holds the lock on a partial file or folder."""
    if fcntl is None:
        return None
    descriptor = os.open(partial, os.O_RDONLY)
    with suppress(OSError):  # some network file systems have no locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _place_new(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "File exists", str(path)) from error
        os.rename(partial, path)

"""Atomic writing of files and folders, and deletion of partial files left by killed processes.

Data is written to a hidden partial file beside the target, which is renamed at the end. A killed
process leaves its partial file behind; the next process that writes to the folder deletes it. A
lock on the partial file, which the operating system releases when a process ends, shows whether
its writer is still running.
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
except ImportError:  # Windows: no locks, so leftovers are not deleted
    fcntl = None  # type: ignore[assignment]

_PARTIAL = re.compile(r"\..*\.[0-9a-f]{8}\.partial", re.DOTALL)
# Partial files younger than this are not deleted: a file exists briefly before it is locked.
_MIN_LEFTOVER_AGE = 2.0  # seconds
# Bytes of the target's name in the name of its partial file, which may have 255 bytes in all.
_NAME_BYTES = 100
_FSYNC_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
_LINK_UNSUPPORTED = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EOPNOTSUPP)


def is_partial(name: str) -> bool:
    """Whether a name is that of a partial file or folder, in use or left behind."""
    return _PARTIAL.fullmatch(name) is not None


@contextmanager
def atomic_file(path: Path, *, folder: Path | None = None, new: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing that atomically replaces its target on exit, and is fsynced.

    After an error the target is unchanged and the partial file is deleted.

    Args:
        path: The target; its folder must exist.
        folder: Folder of the partial file, on the same disk; None: the target's folder.
        new: Refuse to replace an existing file.

    Raises:
        OSError: The file cannot be written, or ``new`` is set and the target exists.
    """
    partial = _partial_path(path, folder)
    lock = None
    try:
        with open(partial, "xb") as file:
            lock = _lock(partial)
            yield file
            file.flush()
            os.fsync(file.fileno())
        if new:
            _link_new(partial, path)
        else:
            os.replace(partial, path)
        fsync_folder(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink()
        _unlock(lock)


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Create a temporary folder beside a target, for the caller to fill and rename to it.

    It is deleted on exit unless it was renamed.

    Raises:
        OSError: The folder cannot be created.
    """
    partial = _partial_path(path)
    lock = None
    try:
        partial.mkdir(parents=True)
        lock = _lock(partial)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _unlock(lock)


def write_atomic(path: Path, data: bytes, *, folder: Path | None = None, new: bool = False) -> None:
    """Write a file atomically; arguments and errors as for :func:`atomic_file`."""
    with atomic_file(path, folder=folder, new=new) as file:
        file.write(data)


def write_new_file(path: Path, data: bytes) -> None:
    """Write and fsync a new file.

    Raises:
        FileExistsError: The file exists.
    """
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that renames and new files survive a power loss."""
    if os.name != "posix":  # folders cannot be opened elsewhere, and renames are durable
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _FSYNC_UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def delete_leftovers(folder: Path) -> None:
    """Delete a folder's partial files and folders whose writers have ended, ignoring errors."""
    with suppress(OSError):
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if is_partial(name) and _is_leftover(path):
                if os.path.isdir(path):
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with suppress(OSError):
                        os.unlink(path)


def _is_leftover(path: str) -> bool:
    """Whether a partial file or folder has no running writer."""
    try:
        status = os.lstat(path)
        kind = stat.S_IFMT(status.st_mode)
        if fcntl is None or kind not in (stat.S_IFREG, stat.S_IFDIR):
            return False
        if abs(time.time() - status.st_mtime) < _MIN_LEFTOVER_AGE:
            return False
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
    except OSError:  # locked, deleted, or on a file system without locks
        return False
    return True


def _partial_path(path: Path, folder: Path | None = None) -> Path:
    folder = path.parent if folder is None else folder
    delete_leftovers(folder)
    start = os.fsdecode(os.fsencode(path.name)[:_NAME_BYTES])
    return folder / f".{start}.{secrets.token_hex(4)}.partial"


def _lock(partial: Path) -> int | None:
    """Lock a partial file or folder; return the descriptor that owns the lock."""
    if fcntl is None:
        return None
    descriptor = os.open(partial, os.O_RDONLY)
    with suppress(OSError):  # some network file systems have no locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _link_new(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path)
    except OSError as error:
        if error.errno not in _LINK_UNSUPPORTED:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "File exists", str(path)) from error
        os.rename(partial, path)

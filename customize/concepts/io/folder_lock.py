"""An exclusive lock on an output folder, between threads, processes and hosts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from customize.concepts.io.output_folder import check_writable
from customize.errors import StorageError, storage_error


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the exclusive lock of a folder inside the context.

    The lock is an operating-system lock on the file ``.NAME.lock`` beside the folder, which is
    deleted at the end. The system releases it when the process dies; a leftover file is reused.
    Hosts that share a file system share the lock if the file system supports locks. Parent folders
    are created, and removed again if they stay empty.

    Args:
        folder: The folder; it need not exist.

    Raises:
        StorageError: If another run has the lock, or the parent folder is not writable.
    """
    from filelock import FileLock, Timeout

    folder = folder.resolve()
    try:
        check_writable(folder.parent)
    except StorageError as error:
        raise StorageError(error.problem, where=folder, fix=error.fix) from error
    path = folder.parent / f".{folder.name}.lock"
    missing_parents = [parent for parent in folder.parents if not parent.exists()]
    # Not a singleton, because another thread may hold a lock on the same file.
    lock = FileLock(path, mode=0o664, is_singleton=False)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise StorageError(
            "another run writes to this folder",
            where=folder,
            fix="wait until it ends, or choose another output folder",
        ) from None
    except OSError as error:
        raise storage_error(error, folder.parent) from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows deletes it on release
            path.unlink()  # while locked, so that a waiting process sees that it is deleted
        lock.release()
        for parent in missing_parents:
            with suppress(OSError):  # not empty
                parent.rmdir()

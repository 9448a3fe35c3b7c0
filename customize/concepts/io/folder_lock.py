"""A lock on a folder that is being written, between threads, processes and hosts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from customize.concepts.io.output_folder import check_writable
from customize.errors import StorageError, storage_error


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Be the only one that writes to a folder, among all that ask for this.

    The lock is that of the operating system on a file ``.NAME.lock`` beside the folder, which is
    deleted at the end. When a process dies, the system frees the lock, and a file that is left is
    taken over. Hosts that share a file system see one another's locks where that has locks. The
    folders above it are made, and removed again if nothing was written.

    Args:
        folder: it need not exist.

    Raises:
        StorageError: somebody else writes to it, or the folder above it cannot be written.
    """
    from filelock import FileLock, Timeout

    folder = folder.resolve()
    try:
        check_writable(folder.parent)
    except StorageError as error:
        raise StorageError(error.problem, where=folder, fix=error.fix) from error
    path = folder.parent / f".{folder.name}.lock"
    made = [parent for parent in folder.parents if not parent.exists()]
    # Not shared with other locks on this file, as another thread may have one.
    lock = FileLock(path, mode=0o664, is_singleton=False)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise StorageError(
            "another run writes to this folder",
            where=folder,
            fix="wait until it has ended, or choose another output folder",
        ) from None
    except OSError as error:
        raise storage_error(error, folder.parent) from error
    try:
        yield
    finally:
        with suppress(OSError):  # on Windows, where the release deletes it
            path.unlink()  # while it is held, so that whoever opened it before sees that it is gone
        lock.release()
        for parent in made:
            with suppress(OSError):  # not empty
                parent.rmdir()

"""Reading of untrusted files: regular files only, with a limit on their size.

Opening a FIFO blocks, a device may have no end, and a sparse file of a few bytes on disk reads as
gigabytes of zeros. All files that a user or another program names are therefore opened by this
module. The checks are made on the open file, because its path may lead to another file later.
A refused file raises an ``OSError`` with the reason in its ``strerror``.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from customize.errors import ConfigError
from customize.text import quote

if TYPE_CHECKING:
    from torch import Tensor

MB = 2**20
#: Maximum size of a short JSON or text file, bytes.
MAX_TEXT_BYTES = MB
#: Maximum size of a JSON or text file with many rows, bytes.
MAX_TABLE_BYTES = 64 * MB
#: Maximum size of an image file, bytes; 89 megapixels of 4 x 16 bits have 716 MB.
MAX_IMAGE_BYTES = 1024 * MB
#: Maximum size of a safetensors file of one concept, bytes.
MAX_SAFETENSORS_BYTES = 8 * 1024 * MB
#: Maximum size of a safetensors header, bytes, by the format.
MAX_HEADER_BYTES = 100_000_000
#: Suffixes of checkpoints that are pickles, which run code when they are loaded.
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# On Windows some of these do not exist, and O_BINARY does.
_FLAGS = os.O_RDONLY | sum(
    getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY")
)
_FLOATS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_MIN_SPARSE_BYTES = 256 * MB  # smaller files are read even if they have holes


def as_path(value: Any, where: str) -> Path:
    """Return the path that a user gave.

    Args:
        value: What was given.
        where: Name of the argument in messages.

    Raises:
        ConfigError: It is neither a text nor a path, or has a zero byte.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or "\0" in text:
        raise ConfigError(
            f"{quote(value)} is not a path", where=where, fix="give a text or a pathlib.Path"
        )
    return Path(text)


def path_exists(path: str | Path) -> bool:
    """Whether a path exists, including unreadable files, so that reading one reports the cause.

    Unlike ``is_file`` it is true for a FIFO, a dangling link, and in an unreadable folder.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    return True


def real_path(path: str | Path) -> Path:
    """Return the absolute path with links resolved.

    Unlike ``Path.resolve`` it does not fail on circular links; opening the path reports them.
    """
    return Path(os.path.realpath(path))


def open_regular(path: str | Path, limit: int) -> BinaryIO:
    """Open a regular file of at most ``limit`` bytes for reading.

    Raises:
        OSError: The file is missing, unreadable, not a regular file, larger than ``limit``, or
            over 256 MB with less than an eighth of it written.
    """
    try:
        # Opening a device can already act on it, so it is refused before that as well.
        _check_kind(os.stat(path), path)
        descriptor = os.open(path, _FLAGS)
    except ValueError as error:  # a zero byte or a lone surrogate
        raise OSError(errno.EINVAL, "it is not a valid file name") from error
    try:
        status = os.fstat(descriptor)
        _check_kind(status, path)
        if status.st_size > limit:
            raise OSError(
                errno.EFBIG,
                f"its {status.st_size:,} bytes are larger than the limit of {limit:,}",
                str(path),
            )
        if status.st_size > _MIN_SPARSE_BYTES and _is_sparse(descriptor, status.st_size):
            raise OSError(
                errno.EINVAL,
                f"it is sparse: most of its {status.st_size:,} bytes were never written",
                str(path),
            )
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | Path, limit: int) -> bytes:
    """Read a regular file of at most ``limit`` bytes.

    Raises:
        OSError: See :func:`open_regular`; or the content does not fit into memory.
    """
    with open_regular(path, limit) as file:
        return _read_content(file)


def read_text(path: str | Path, limit: int) -> str:
    """Read a regular UTF-8 file of at most ``limit`` bytes, without a byte order mark.

    Line ends are converted to newlines.

    Raises:
        OSError: See :func:`open_regular`.
        UnicodeDecodeError: The file is not UTF-8.
    """
    text = read_bytes(path, limit).decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | Path, limit: int) -> Any:
    """Read the value of a regular JSON file of at most ``limit`` bytes.

    Raises:
        OSError: See :func:`open_regular`.
        ValueError: The file is not valid JSON, or is nested too deeply.
    """
    try:
        return json.loads(read_bytes(path, limit))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_safetensors(path: str | Path, limit: int = MAX_SAFETENSORS_BYTES) -> bytes:
    """Read a safetensors file whose header accounts for every byte of it.

    The header is compared with the file size before the tensors are read, so that a truncated or
    malformed file takes no memory.

    Raises:
        OSError: See :func:`open_regular`; or the content does not fit into memory.
        ValueError: The header is malformed, or does not match the file size.
    """
    with open_regular(path, limit) as file:
        _read_header(file)
        file.seek(0)
        return _read_content(file)


def read_safetensors_header(path: str | Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Read the header of a safetensors file of any size, without its tensors.

    Returns:
        Tensor name -> shape, and the metadata.

    Raises:
        OSError: See :func:`open_regular`.
        ValueError: See :func:`read_safetensors`.
    """
    with open_regular(path, 2**63) as file:
        header, _ = _read_header(file)
    metadata = header.pop("__metadata__", None) or {}
    return {name: list(entry["shape"]) for name, entry in header.items()}, metadata


@contextmanager
def map_float_tensors(path: str | Path) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Iterate over names and floating-point tensors of a safetensors file of any size.

    The tensors are memory-mapped: read-only, loaded on access, and valid within the context.

    Raises:
        OSError: See :func:`open_regular`.
        ValueError: See :func:`read_safetensors`.
    """
    import mmap
    import warnings

    import torch

    with open_regular(path, 2**63) as file:
        header, start = _read_header(file)
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, entry in header.items():
                first, last = (0, 0) if name == "__metadata__" else entry["data_offsets"]
                if first == last or entry["dtype"] not in _FLOATS:
                    continue
                dtype = getattr(torch, _FLOATS[entry["dtype"]])
                count = (last - first) // dtype.itemsize
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch warns that the buffer is read-only
                    flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=start + first)
                yield name, flat.reshape(entry["shape"])

        yield tensors()


def check_regular_files(folder: str | Path, depth: int = 2) -> None:
    """Check that a folder has only regular files, before another library reads it.

    Args:
        folder: The folder.
        depth: How many levels of folders are checked.

    Raises:
        OSError: A FIFO, socket, device or sparse file was found, or a folder is unreadable.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                status = entry.stat()
            except OSError:  # a dangling link, for example: reading it reports the cause
                continue
            if not stat.S_ISDIR(status.st_mode):
                _check_kind(status, entry.path)
                if status.st_size > _MIN_SPARSE_BYTES:
                    open_regular(entry.path, status.st_size).close()
            elif depth > 1:
                check_regular_files(entry.path, depth - 1)


def _check_kind(status: os.stat_result, path: str | Path) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file", str(path))
    if kind != stat.S_IFREG:
        name = _KINDS.get(kind, "something else")
        raise OSError(errno.EINVAL, f"it is {name}, not a regular file", str(path))


def _read_content(file: BinaryIO) -> bytes:
    # Not until the end of the file, which a growing file may not have.
    size = os.fstat(file.fileno()).st_size
    try:
        return file.read(size)
    except MemoryError as error:
        raise OSError(errno.ENOMEM, f"its {size:,} bytes do not fit into memory") from error


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Return the header, checked against the file size, and the offset of the first tensor."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise ValueError("its header is longer than the file")
    start = 8 + length
    try:
        header = json.loads(file.read(length))
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        ends = [entry["data_offsets"][1] for entry in entries]
        whole = all(
            type(number) is int and number >= 0
            for entry in entries
            for number in (*entry["data_offsets"], *entry["shape"])
        )
        metadata = header.get("__metadata__") or {}
        texts = all(isinstance(text, str) for text in metadata.values())
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError) as error:
        raise ValueError("its header is not a safetensors header") from error
    if not (whole and texts):
        raise ValueError("its header is not a safetensors header")
    end = start + max(ends, default=0)
    if end != size:
        raise ValueError(f"its header is that of a file of {end:,} bytes, and it has {size:,}")
    return header, start


def _is_sparse(descriptor: int, size: int) -> bool:
    """Whether less than an eighth of a file was written, as far as the system reports it."""
    if not hasattr(os, "SEEK_DATA"):
        return False
    written = position = 0
    try:
        while position < size and written * 8 < size:
            position = os.lseek(descriptor, position, os.SEEK_DATA)
            end = os.lseek(descriptor, position, os.SEEK_HOLE)
            written, position = written + end - position, end
    except OSError as error:
        if error.errno != errno.ENXIO:  # ENXIO: no data after the position
            return False
    finally:
        os.lseek(descriptor, 0, os.SEEK_SET)
    return written * 8 < size

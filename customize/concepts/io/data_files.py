"""JSON and safetensors files of concepts: validated reading, and serialization of tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from customize.concepts.concept_info import MAX_NAME
from customize.errors import ConceptError
from customize.safe_read import read_bytes, read_safetensors

_MAX_JSON_BYTES = 16 * 2**20


def read_file_bytes(path: Path) -> bytes:
    """The content of a JSON file of at most 16 MiB.

    Raises:
        ConceptError: If the file is missing, too large, or cannot be read.
    """
    try:
        return read_bytes(path, _MAX_JSON_BYTES)
    except OSError as error:
        raise _unreadable_file(error, path) from error


def read_json_file(path: Path) -> Any:
    """The parsed content of a JSON file of at most 16 MiB.

    Raises:
        ConceptError: If the file cannot be read or parsed.
    """
    try:
        return parse_json(read_file_bytes(path))
    except (ValueError, RecursionError) as error:
        raise ConceptError(
            f"the file is not valid JSON: {error}", where=path, fix="get an unchanged copy"
        ) from error


def parse_json(text: str | bytes) -> Any:
    """Parse JSON without the constants NaN and Infinity, which JSON does not have.

    Raises:
        ValueError: If the text is not JSON.
        RecursionError: If it is nested too deeply.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a JSON number")

    return json.loads(text, parse_constant=refuse)


def read_safetensors_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a ``.safetensors`` file, on the CPU, and the metadata of its header.

    Raises:
        ConceptError: If the file has another extension, is missing, or cannot be parsed.
    """
    if path.suffix.lower() != ".safetensors":
        raise ConceptError(
            "a concept is a folder or a .safetensors file", where=path, fix="name one of these"
        )
    return read_tensors(path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As :func:`read_safetensors_file`, whatever the file's extension.

    Raises:
        ConceptError: If the file is missing, cannot be parsed, or has a tensor with too long a
        name.
    """
    from safetensors.torch import load

    # The bytes are read once and parsed in memory: a memory-mapped file that is replaced or
    # truncated later would change the tensors or crash the process.
    try:
        data = read_safetensors(path)
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except OSError as error:
        raise _unreadable_file(error, path) from error
    except Exception as error:  # a parser may raise anything on untrusted bytes
        raise ConceptError(
            f"the file is damaged, or is not a safetensors file: {str(error)[:MAX_NAME]}",
            where=path,
            fix="get an unchanged copy",
        ) from error
    longest = max(map(len, tensors), default=0)
    if longest > MAX_NAME:  # error messages show names
        raise ConceptError(
            f"a tensor in the file has a name of {longest} characters; the limit is {MAX_NAME}",
            where=path,
            fix="get an unchanged copy",
        )
    return tensors, metadata


def safetensors_bytes(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], format: str | None = "pt"
) -> bytes:
    """The content of a safetensors file; the same bytes for the same tensors and metadata.

    Args:
        tensors: Name -> tensor, on any device; tensors may share memory.
        metadata: The header's metadata.
        format: The header's ``format`` field; None leaves it out.
    """
    from safetensors.torch import save

    # Clones, because safetensors refuses tensors that share memory (a slice used in many layers).
    copies = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
    return _sort_header(save(copies, ({"format": format} if format else {}) | dict(metadata)))


def _sort_header(data: bytes) -> bytes:
    """The same file with the header's keys sorted, because safetensors leaves their order open."""
    start = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(data[8:start]), sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + data[start:]


def _unreadable_file(error: OSError, path: Path) -> ConceptError:
    if isinstance(error, FileNotFoundError):
        return ConceptError("the file is missing", where=path, fix="get an unchanged copy")
    denied = isinstance(error, PermissionError)
    return ConceptError(
        f"the file cannot be read: {error.strerror or error}",
        where=path,
        fix="allow reading it" if denied else "get an unchanged copy of the concept",
    )

"""Reading and validating files of recorded layer inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from customize.concepts.io.data_files import read_safetensors_file
from customize.errors import ConceptError

HEADER = "customize_layer_inputs"
VERSION = 1
KINDS = ("own", "generic")

_FIX = "delete it, or record the inputs again: customize record"
# The energy of a factor is 1 up to rounding (its second moment has trace 1); a far larger one would
# overflow in a merge.
_MAX_ENERGY = 1e4


class _Header(BaseModel):
    """The header's JSON.

    Attributes:
        version: Format version.
        of: Digest of the recorded updates; see
            :class:`customize.concepts.input_statistics.LayerInputs`.
        same: Key of a layer -> key of the tensor of a layer with the same input.
    """

    model_config = ConfigDict(strict=True)

    version: int
    of: str = Field(max_length=256)
    same: dict[str, str]


def read_input_statistics(path: Path) -> tuple[str, dict[str, dict[str, dict[str, Tensor]]]]:
    """Read a file of layer inputs.

    Returns:
        The digest of the recorded updates; and "own" and "generic" -> component -> module -> (n,
        in), float32, n and in at least 1.

    Raises:
        ConceptError: If the file is missing, truncated, of a later version or another kind; a
            tensor is not a floating-point matrix, has a value that is not finite, or too much
            energy.
    """
    tensors, metadata = read_safetensors_file(path)
    header = _parse_header(metadata, path)
    checked = {key: _check_factor(key, rows, path) for key, rows in tensors.items()}
    factors: dict[str, dict[str, dict[str, Tensor]]] = {kind: {} for kind in KINDS}
    for key, rows in _expand_shared(checked, header.same, path):
        kind, _, layer = key.partition(".")
        component, _, module = layer.partition(".")
        if kind not in factors or not component or not module:
            raise ConceptError(f"the key {_shorten(key)} is invalid", where=path, fix=_FIX)
        factors[kind].setdefault(component, {})[module] = rows
    return header.of, factors


def _parse_header(metadata: Mapping[str, str], path: Path) -> _Header:
    if HEADER not in metadata:
        raise ConceptError("the file is not a record of layer inputs", where=path, fix=_FIX)
    try:
        header = _Header.model_validate_json(metadata[HEADER])
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise ConceptError(
            f"the header of the record of layer inputs is invalid at {_shorten(field)}: "
            f"{first['msg'][:200]}",
            where=path,
            fix=_FIX,
        ) from error
    if header.version != VERSION:
        raise ConceptError(
            f"the record has version {_shorten(header.version)}; this version of customize reads "
            f"{VERSION}",
            where=path,
            fix="update customize, or record the inputs again: customize record",
        )
    return header


def _expand_shared(
    tensors: Mapping[str, Tensor], same: Mapping[str, str], path: Path
) -> Iterator[tuple[str, Tensor]]:
    yield from tensors.items()
    for key, first in same.items():
        if key in tensors or first not in tensors:
            raise ConceptError(
                f"the key {_shorten(key)} is invalid: it refers to {_shorten(first)}",
                where=path,
                fix=_FIX,
            )
        yield key, tensors[first]


def _check_factor(key: str, rows: Tensor, path: Path) -> Tensor:
    if rows.ndim != 2 or not rows.numel() or not rows.is_floating_point():
        raise ConceptError(
            f"the key {_shorten(key)} is invalid: a tensor of shape {tuple(rows.shape)[:8]} and "
            f"dtype {rows.dtype} is not a floating-point matrix",
            where=path,
            fix=_FIX,
        )
    rows = rows.float()
    energy = float(rows.double().square().sum()) if bool(torch.isfinite(rows).all()) else None
    if energy is None:
        raise ConceptError(f"{_shorten(key)} has a value that is not finite", where=path, fix=_FIX)
    if energy > _MAX_ENERGY:
        raise ConceptError(
            f"{_shorten(key)} has the energy {energy:.3g}; the energy of layer inputs is at most 1",
            where=path,
            fix=_FIX,
        )
    return rows


def _shorten(value: object) -> str:
    """A value from a file, shortened for an error message."""
    return repr(str(value)[:80])

"""Reading a file of layer inputs, which anybody may have made: it is checked whole, or refused."""

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
# A second moment of trace 1 has this energy, rounding apart. Far above it a merge overflows.
_MAX_ENERGY = 1e4


class _Header(BaseModel):
    """What the header says.

    Attributes:
        version: of the format.
        of: what was recorded; see :class:`customize.concepts.input_statistics.LayerInputs`.
        same: key of a layer -> key of a tensor, of another layer that reads the same.
    """

    model_config = ConfigDict(strict=True)

    version: int
    of: str = Field(max_length=256)
    same: dict[str, str]


def read_input_statistics(path: Path) -> tuple[str, dict[str, dict[str, dict[str, Tensor]]]]:
    """What a file of layer inputs has.

    Returns:
        What was recorded; and "own" and "generic" -> component -> module -> (n, in), float32, n and
        in at least 1.

    Raises:
        ConceptError: it is missing, cut short, of a later version or no record; a tensor is not of
            two dimensions or not of floating-point numbers, has one that is not finite, or more
            energy than layer inputs have.
    """
    tensors, metadata = read_safetensors_file(path)
    header = _parsed(metadata, path)
    checked = {key: _checked(key, rows, path) for key, rows in tensors.items()}
    found: dict[str, dict[str, dict[str, Tensor]]] = {kind: {} for kind in KINDS}
    for key, rows in _named(checked, header.same, path):
        kind, _, layer = key.partition(".")
        component, _, module = layer.partition(".")
        if kind not in found or not component or not module:
            raise ConceptError(f"the key {_short(key)} is wrong", where=path, fix=_FIX)
        found[kind].setdefault(component, {})[module] = rows
    return header.of, found


def _parsed(metadata: Mapping[str, str], path: Path) -> _Header:
    if HEADER not in metadata:
        raise ConceptError("this is no record of layer inputs", where=path, fix=_FIX)
    try:
        header = _Header.model_validate_json(metadata[HEADER])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise ConceptError(
            f"this is no record of layer inputs: its header is wrong at {_short(place)}: "
            f"{first['msg'][:200]}",
            where=path,
            fix=_FIX,
        ) from error
    if header.version != VERSION:
        raise ConceptError(
            f"the record has version {_short(header.version)}; this version of customize reads "
            f"{VERSION}",
            where=path,
            fix="update customize, or record the inputs again: customize record",
        )
    return header


def _named(
    tensors: Mapping[str, Tensor], same: Mapping[str, str], path: Path
) -> Iterator[tuple[str, Tensor]]:
    yield from tensors.items()
    for key, first in same.items():
        if key in tensors or first not in tensors:
            raise ConceptError(
                f"the key {_short(key)} is wrong: it is said to be that of {_short(first)}",
                where=path,
                fix=_FIX,
            )
        yield key, tensors[first]


def _checked(key: str, rows: Tensor, path: Path) -> Tensor:
    if rows.ndim != 2 or not rows.numel() or not rows.is_floating_point():
        raise ConceptError(
            f"the key {_short(key)} is wrong: a tensor of shape {tuple(rows.shape)[:8]} and type "
            f"{rows.dtype} is no set of directions",
            where=path,
            fix=_FIX,
        )
    rows = rows.float()
    energy = float(rows.double().square().sum()) if bool(torch.isfinite(rows).all()) else None
    if energy is None:
        raise ConceptError(f"{_short(key)} has a number that is not finite", where=path, fix=_FIX)
    if energy > _MAX_ENERGY:
        raise ConceptError(
            f"{_short(key)} has the energy {energy:.3g}, and layer inputs have at most 1",
            where=path,
            fix=_FIX,
        )
    return rows


def _short(value: object) -> str:
    """A value from a file for a message, bounded."""
    return repr(str(value)[:80])

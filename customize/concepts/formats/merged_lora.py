"""Parsing a merged LoRA that was written by customize: its updates, and the tokens of its triggers.

The header of the file stores the architecture and, for kohya's keys, the layers of the model that
each layer of the file belongs to, so that parsing needs no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor

from customize.concepts.formats.layer_updates import decode_update
from customize.concepts.formats.lora_file import name_from_file
from customize.concepts.formats.tensor_keys import group_by_layer
from customize.concepts.io.file_layout import SECOND_DENOISERS, SECOND_LORA_FILE
from customize.concepts.tokens.subjects import Subject, subjects_from_header
from customize.concepts.types import Lora, LoraInfo
from customize.core.lowrank import LowRank, slice_rows, stack_rows
from customize.errors import ConceptError

#: Key of the header that stores the content of ``merged.json``, with :class:`MergeInfo`.
MERGED_HEADER = "customize_merged"
_FIX_DAMAGED = "get an unchanged copy of the file, or merge again"


class MergeInfo(BaseModel):
    """The facts in the header of a merged LoRA.

    Attributes:
        base: Name or path of the base model; empty if only imported LoRAs were merged.
        family: Name of the model family.
        fingerprint: As in :class:`customize.concepts.concept_info.ConceptInfo`; empty as above.
        words: Words for a prompt that call all merged concepts.
        rank: Component -> highest rank of its layers, for all components of the merge.
        layers: Layer of the file -> (component, module, first row, last row + 1) of the model's
            layers that its rows belong to; empty if the file uses the model's layer names.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    base: str = Field(max_length=500)
    family: str = Field(pattern=r"^[a-z0-9_]{1,32}$")
    fingerprint: dict[str, JsonValue]
    words: str = Field(max_length=2**16)
    rank: dict[str, int]
    layers: dict[str, list[tuple[str, str, int, int]]] = {}


def parse_merge_info(header: Mapping[str, str]) -> MergeInfo | None:
    """Parse a header; None if it is not that of a merge, or of an earlier version."""
    try:
        return MergeInfo.model_validate(json.loads(header[MERGED_HEADER]))
    except (KeyError, ValueError, ValidationError, RecursionError):
        return None


def merged_lora_info(name: str, facts: MergeInfo, subjects: Sequence[Subject]) -> LoraInfo:
    """The facts on a merged LoRA, from its header."""
    return LoraInfo(
        name_from_file(name),
        facts.family,
        facts.base,
        max(facts.rank.values(), default=0),
        trigger_words=" ".join("".join(c if c.isprintable() else " " for c in facts.words).split()),
        fingerprint=facts.fingerprint,
        num_tokens=sum(subject.num_tokens for subject in subjects),
        token_layers=max((subject.token_layers for subject in subjects), default=0),
        triggers=tuple(subject.trigger for subject in subjects),
    )


def parse_merged_lora(
    name: str,
    path: Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    second: Mapping[str, Tensor] | None = None,
) -> Lora | None:
    """Parse the content of a merged LoRA; None if the header is not that of a merge.

    Args:
        name: Name of the file or folder.
        path: Path of the file.
        tensors: Key -> tensor.
        header: The safetensors header.
        second: Tensors of the second denoiser, from their own file; None if there is none.

    Raises:
        ConceptError: If the file is damaged, or the second denoiser's file is missing.
    """
    facts = parse_merge_info(header)
    if facts is None:
        return None
    subjects = subjects_from_header(header, path)
    if (
        second is None and path.name == SECOND_LORA_FILE
    ):  # the merge changes only the second denoiser
        tensors, second = {}, tensors
    updates: dict[str, dict[str, LowRank]] = {}
    for component, module, update in _parse_updates(tensors, facts.layers, path):
        updates.setdefault(component, {})[module] = update
    if second is not None:
        names = {first: other for other, first in SECOND_DENOISERS.items()}
        for component, module, update in _parse_updates(second, {}, path.parent / SECOND_LORA_FILE):
            if component not in names:
                raise ConceptError(
                    f"keys of the second denoiser must begin with {' or '.join(names)}, "
                    f"not {component}.{module}",
                    where=path.parent / SECOND_LORA_FILE,
                    fix=_FIX_DAMAGED,
                )
            updates.setdefault(names[component], {})[module] = update
    if updates.keys() != facts.rank.keys():
        missing = sorted(facts.rank.keys() - updates.keys())
        unexpected = sorted(updates.keys() - facts.rank.keys())
        raise ConceptError(
            f"the merge lacks its updates of {', '.join(missing)}"
            if missing
            else f"the file has updates of {', '.join(unexpected)}, not part of the merge",
            where=path,
            fix=f"give the folder that contains {SECOND_LORA_FILE}"
            if set(missing) & SECOND_DENOISERS.keys()
            else _FIX_DAMAGED,
        )
    return Lora(merged_lora_info(name, facts, subjects), updates, subjects=subjects, source=path)


def _parse_updates(
    tensors: Mapping[str, Tensor], layers: Mapping[str, Any], where: Path
) -> list[tuple[str, str, LowRank]]:
    """(component, module, update) of each layer of the model that the file changes."""
    parts: dict[tuple[str, str], list[tuple[int, LowRank]]] = {}
    for group in group_by_layer(tensors, where):
        try:
            update = decode_update(group, lambda rank: 1.0, _no_weight)
        except ConceptError as error:
            raise ConceptError(
                error.problem, where=f"{where}: {group.path}", fix=_FIX_DAMAGED
            ) from error
        component, _, module = group.path.partition(".")
        targets = layers.get(group.path) or [(component, module, 0, update.shape[0])]
        first = 0
        for component, module, start, stop in targets:
            count = stop - start
            if count < 1 or first + count > update.shape[0] or not module:
                raise ConceptError(
                    "the file's header and its updates disagree",
                    where=f"{where}: {group.path}",
                    fix=_FIX_DAMAGED,
                )
            part = update if len(targets) == 1 else _slice_nonzero(update, first, first + count)
            if part is not None:
                parts.setdefault((component, module), []).append((start, part))
            first += count
    updates = []
    for (component, module), layer_parts in parts.items():
        layer_parts.sort(key=lambda part: part[0])
        stacked = [part for _, part in layer_parts]
        update = stacked[0] if len(stacked) == 1 else stack_rows(stacked)
        updates.append((component, module, update))
    return updates


def _slice_nonzero(update: LowRank, start: int, stop: int) -> LowRank | None:
    """Rows of an update, without unused ranks; None if they are all zero."""
    part = slice_rows(update, start, stop)
    used = part.up.ne(0).any(0)
    return LowRank(part.up[:, used], part.down[used], part.scale) if bool(used.any()) else None


def _no_weight() -> Tensor:
    raise ConceptError("updates of a merge cannot depend on the base weights")

"""A merged LoRA, read back whole: its updates, and what its triggers call.

The header of the file says of which architecture it is and, by kohya's keys, which layers of a
model each of the file's is; so that no model is needed to read it.
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

#: A key of the header: :class:`MergeInfo` as JSON, with what else ``merged.json`` says.
MERGED_HEADER = "customize_merged"
_ANEW = "get an unchanged copy of the file, or merge again"


class MergeInfo(BaseModel):
    """What the header of a merged LoRA says.

    Attributes:
        base: the base model's name or path; empty where only LoRAs from elsewhere were merged.
        family: the model family's name.
        fingerprint: as :class:`customize.concepts.concept_info.ConceptInfo` has it; empty as above.
        words: what a prompt says to mean all that was merged.
        rank: component -> the largest of its layers; all components of the merge.
        layers: a layer of the file -> (component, module, first row, last row + 1) of the model's
            layers that its rows are; empty where the file's names are the model's.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    base: str = Field(max_length=500)
    family: str = Field(pattern=r"^[a-z0-9_]{1,32}$")
    fingerprint: dict[str, JsonValue]
    words: str = Field(max_length=2**16)
    rank: dict[str, int]
    layers: dict[str, list[tuple[str, str, int, int]]] = {}


def parse_merge_info(header: Mapping[str, str]) -> MergeInfo | None:
    """What a header says; None where it is no merge, or of an earlier version."""
    try:
        return MergeInfo.model_validate(json.loads(header[MERGED_HEADER]))
    except (KeyError, ValueError, ValidationError, RecursionError):
        return None


def merged_lora_info(name: str, facts: MergeInfo, subjects: Sequence[Subject]) -> LoraInfo:
    """The facts on a merge, from its header."""
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
    """The merge in a file; None where its header does not say all that is needed.

    Args:
        name: of the file or folder.
        second: the tensors of a second denoiser, from a file of their own.

    Raises:
        ConceptError: it is damaged, or the second denoiser's file is missing.
    """
    facts = parse_merge_info(header)
    if facts is None:
        return None
    subjects = subjects_from_header(header, path)
    if second is None and path.name == SECOND_LORA_FILE:  # the merge changes the second one alone
        tensors, second = {}, tensors
    products: dict[str, dict[str, LowRank]] = {}
    for component, module, update in _updates(tensors, facts.layers, path):
        products.setdefault(component, {})[module] = update
    if second is not None:
        names = {first: other for other, first in SECOND_DENOISERS.items()}
        for component, module, update in _updates(second, {}, path.parent / SECOND_LORA_FILE):
            if component not in names:
                raise ConceptError(
                    f"the keys of a second denoiser begin with {' or '.join(names)}, and nothing "
                    f"is loaded by half: {component}.{module}",
                    where=path.parent / SECOND_LORA_FILE,
                    fix=_ANEW,
                )
            products.setdefault(names[component], {})[module] = update
    if products.keys() != facts.rank.keys():
        lacking = sorted(facts.rank.keys() - products.keys())
        also = sorted(products.keys() - facts.rank.keys())
        raise ConceptError(
            f"the merge lacks its updates of {', '.join(lacking)}"
            if lacking
            else f"the file has updates of {', '.join(also)}, which the merge had not",
            where=path,
            fix=f"name the folder, with {SECOND_LORA_FILE} in it"
            if set(lacking) & SECOND_DENOISERS.keys()
            else _ANEW,
        )
    return Lora(merged_lora_info(name, facts, subjects), products, subjects=subjects, source=path)


def _updates(
    tensors: Mapping[str, Tensor], layers: Mapping[str, Any], where: Path
) -> list[tuple[str, str, LowRank]]:
    """(component, module, update) of every layer of a model that the file changes."""
    parts: dict[tuple[str, str], list[tuple[int, LowRank]]] = {}
    for group in group_by_layer(tensors, where):
        try:
            update = decode_update(group, lambda rank: 1.0, _no_weight)
        except ConceptError as error:
            raise ConceptError(error.problem, where=f"{where}: {group.path}", fix=_ANEW) from error
        component, _, module = group.path.partition(".")
        places = layers.get(group.path) or [(component, module, 0, update.shape[0])]
        first = 0
        for component, module, start, stop in places:
            count = stop - start
            if count < 1 or first + count > update.shape[0] or not module:
                raise ConceptError(
                    "the file's header and its updates disagree",
                    where=f"{where}: {group.path}",
                    fix=_ANEW,
                )
            part = update if len(places) == 1 else _of_rows(update, first, first + count)
            if part is not None:
                parts.setdefault((component, module), []).append((start, part))
            first += count
    found = []
    for (component, module), own in parts.items():
        own.sort(key=lambda part: part[0])
        whole = own[0][1] if len(own) == 1 else stack_rows([part for _, part in own])
        found.append((component, module, whole))
    return found


def _of_rows(update: LowRank, start: int, stop: int) -> LowRank | None:
    """Some rows of a layer that is several of the model's; None where nothing changes there."""
    part = slice_rows(update, start, stop)
    used = part.up.ne(0).any(0)
    return LowRank(part.up[:, used], part.down[used], part.scale) if bool(used.any()) else None


def _no_weight() -> Tensor:
    raise ConceptError("a merge has no updates that depend on the base's weights")

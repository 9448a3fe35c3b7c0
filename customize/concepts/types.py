"""Concepts and LoRAs in memory: the types that are loaded, attached, merged and saved.

They do no I/O: :mod:`customize.concepts.io` reads and writes concepts, and
:mod:`customize.concepts.formats` reads the LoRA files of other programs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customize.concepts.concept_info import NAME_PATTERN, ConceptInfo, Method, parse_info
from customize.concepts.tokens.subjects import Subject
from customize.core.lowrank import LowRank, all_finite
from customize.errors import ConceptError
from customize.text import quote

_MODULE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Concept:
    """One learned concept, checked whole when it is made.

    Attributes:
        info: the facts.
        products: component ("unet", "text_encoder") -> module -> update; all of rank
            ``info.rank`` and scale ``info.scale``; CLIP's modules under the names used in files.
        embeddings: token dictionary's key -> (num_tokens, width), float; with ``token_layers``
            (num_tokens, token_layers, width); empty without tokens.
        source: the folder or file that it was read from; None for one that was made in memory.

    Raises:
        ConceptError: the parts do not fit together, or a number is not finite.
    """

    info: ConceptInfo
    updates: Mapping[str, Mapping[str, LowRank]]
    embeddings: Mapping[str, Tensor]
    source: Path | None = None

    def __post_init__(self) -> None:
        if not self.updates or not all(self.updates.values()):
            raise ConceptError(f"the concept {self.info.name} changes no layer")
        widths = set()
        for component, updates in self.updates.items():
            for module, update in updates.items():
                where = f"{component}.{module}"
                if not component.isidentifier() or not _MODULE.fullmatch(module):
                    raise ConceptError("this is not the name of a layer", where=where)
                self._check_update(update, where)
                widths.add(str(update.shape[1]))
        if self.info.method == "orthogonal" and widths != set(self.info.slices):
            raise ConceptError(
                f"slices are given for the widths {_listed(self.info.slices)}, "
                f"but the layers have {_listed(widths)}",
                where="slices",
            )
        if bool(self.embeddings) != bool(self.info.num_tokens):
            raise ConceptError(
                f"the concept has {self.info.num_tokens} tokens and "
                f"{len(self.embeddings)} sets of embeddings"
            )
        count, layers = self.info.num_tokens, self.info.token_layers
        leading = (count, layers) if layers else (count,)
        for key, rows in self.embeddings.items():
            if rows.shape[:-1] != leading or rows.shape[-1] < 1:
                raise ConceptError(
                    f"embeddings of shape {tuple(rows.shape)} are not those of {count} tokens"
                    + (f" in {layers} layers" if layers else ""),
                    where=key,
                )
            _check_numbers(rows, key)

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """What its trigger calls by tokens of its own; empty without tokens."""
        info = self.info
        if not self.embeddings:
            return ()
        return (Subject(info.name, info.trigger, info.class_word, self.embeddings),)

    def _check_update(self, update: LowRank, where: str) -> None:
        if update.rank != self.info.rank:
            raise ConceptError(
                f"the update has rank {update.rank} and not {self.info.rank}", where=where
            )
        if update.scale != self.info.scale:
            raise ConceptError(
                f"the update's scale is {update.scale} and not alpha / rank = {self.info.scale}",
                where=where,
            )
        _check_numbers(update.up, where)
        _check_numbers(update.down, where)

    def __repr__(self) -> str:
        info = self.info
        tokens = f"{info.num_tokens} tokens" if info.num_tokens else "no tokens of its own"
        return (
            f"Concept({info.name}: {info.trigger}, a {info.class_word}, {tokens}; family "
            f"{info.family}, base {info.base}; {info.method}, rank {info.rank}; "
            f"{describe_layer_counts(self.updates)})"
        )

    def renamed(self, name: str) -> Concept:
        """The same under another name, with the trigger ``<name>``.

        Raises:
            ConceptError: the name has other characters than a-z, 0-9, _ and -.
        """
        facts = self.info.model_dump() | {"name": name, "trigger": f"<{name}>"}
        return replace(self, info=parse_info(facts, "names"))


@dataclass(frozen=True, eq=False)
class VectorUpdate:
    """What a file does to a bias or the weight of a norm.

    Attributes:
        values: (n,), float32.
        is_replacement: whether they take the parameter's place, and are not added to it.
    """

    values: Tensor
    is_replacement: bool = False


#: component -> parameter, such as "blocks.0.norm2.weight", by the model's names -> change.
VectorUpdates = Mapping[str, Mapping[str, VectorUpdate]]


@dataclass(frozen=True)
class LoraInfo:
    """The facts on a LoRA from elsewhere, with what it lacks of a concept's at its end.

    Attributes:
        name: what it goes by, from its file's name.
        family: the model family's name.
        base: the base model as the file's metadata has it; empty where they say nothing.
        rank: the largest of its layers'.
        words: what the file's maker says to put into a prompt; plain words, or the triggers of a
            merge.
        fingerprint: of the model that a merge of ours was made for; else empty.
        triggers: of a merge of ours, those that have tokens of their own.
    """

    name: str
    family: str
    base: str
    rank: int
    words: str = ""
    class_word: str = ""
    trigger: str = ""
    method: Method = "lora"
    basis: None = None
    slices: Mapping[str, Sequence[int]] = field(default_factory=dict)
    fingerprint: Mapping[str, Any] = field(default_factory=dict, repr=False)
    num_tokens: int = 0
    token_layers: int = 0
    training: Mapping[str, Any] = field(default_factory=dict)
    learned_with: Sequence[str] = ()
    triggers: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA from elsewhere, as the updates that it makes.

    Attributes:
        info: the facts.
        products: component -> module -> update, as :class:`Concept` has them; ranks and scales
            may differ between layers.
        subjects: what triggers call by tokens of their own, in a merge of ours.
        vector_updates: changes of biases and norms.
        source: the file that it was read from.
    """

    info: LoraInfo
    updates: Mapping[str, Mapping[str, LowRank]]
    subjects: Sequence[Subject] = ()
    vector_updates: VectorUpdates = field(default_factory=dict)
    source: Path | None = None

    def __repr__(self) -> str:
        info = self.info
        words = info.words or "no words named"
        return (
            f"Lora({info.name}: {words}; family {info.family}, base {info.base or 'not named'}; "
            f"rank {info.rank}; {describe_layer_counts(self.updates)})"
        )

    def renamed(self, name: str) -> Lora:
        """The same under another name; a merge of several concepts keeps their triggers.

        Raises:
            ConceptError: the name has other characters than a-z, 0-9, _ and -.
        """
        if not re.fullmatch(NAME_PATTERN, name):
            raise ConceptError(
                f"{quote(name)} is not the name of a concept",
                where="names",
                fix="use up to 64 of the characters a-z, 0-9, _ and -, a letter or digit first",
            )
        info = replace(self.info, name=name)
        if len(self.subjects) != 1:
            return replace(self, info=info)
        # What one trigger calls gets the trigger of its name, as a concept does.
        subject = replace(self.subjects[0], name=name, trigger=f"<{name}>")
        info = replace(info, words=subject.trigger, triggers=(subject.trigger,))
        return replace(self, info=info, subjects=(subject,))


#: What can be attached to a pipeline and merged.
Adaptation = Concept | Lora


def describe_layer_counts(parts: Mapping[str, Mapping[str, object]]) -> str:
    """How many layers there are of each component, in words."""
    listed = (f"{len(own)} of {component}" for component, own in sorted(parts.items()))
    return f"layers: {', '.join(listed) or 'none'}"


def _check_numbers(values: Tensor, where: str) -> None:
    if values.dtype not in _DTYPES:
        raise ConceptError(
            f"numbers of type {values.dtype} are not read",
            where=where,
            fix="use float32, float16 or bfloat16",
        )
    if not all_finite(values):
        raise ConceptError(
            "a number is NaN or infinite", where=where, fix="learn the concept again"
        )


def _listed(values: Any) -> str:
    return ", ".join(sorted(values, key=str)) or "none"

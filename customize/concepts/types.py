"""Concepts and LoRAs in memory: the types that are loaded, attached, merged and saved.

They do no I/O: :mod:`customize.concepts.io` reads and writes concepts, and
:mod:`customize.concepts.formats` reads the LoRA files of other programs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from customize.concepts.concept_info import NAME_PATTERN, ConceptInfo, Method, parse_info
from customize.concepts.tokens.subjects import Subject
from customize.core.lowrank import LowRank, all_finite
from customize.errors import ConceptError
from customize.text import plural, quote

_MODULE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Removed:
    """A method of an earlier version: reading it raises an AttributeError with the replacement."""

    def __init__(self, replacement: str) -> None:
        self.replacement = replacement

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"{owner.__name__}.{name}"

    def __get__(self, instance: object, owner: type) -> NoReturn:
        raise AttributeError(f"{self.name} was replaced by {self.replacement}")


@dataclass(frozen=True, eq=False)
class Concept:
    """A learned concept, validated when it is created.

    Attributes:
        info: Facts about the concept.
        updates: Component ("unet", "text_encoder") -> module name, as in files -> update; all of
            rank ``info.rank`` and scale ``info.scale``.
        embeddings: Text encoder's component -> (num_tokens, width), or with token_layers
            (num_tokens, token_layers, width); float32, float16 or bfloat16; empty without tokens.
        source: The folder or file that the concept was read from; None for one made in memory.

    Raises:
        ConceptError: If the parts contradict one another, or a value is not finite.
    """

    info: ConceptInfo
    updates: Mapping[str, Mapping[str, LowRank]]
    embeddings: Mapping[str, Tensor]
    source: Path | None = None

    load = _Removed("customize.load_concept(path)")
    save = _Removed("customize.save_concept(concept, path)")

    def __post_init__(self) -> None:
        if not self.updates or not all(self.updates.values()):
            raise ConceptError(f"the concept {self.info.name} has no updates")
        widths = set()
        for component, updates in self.updates.items():
            for module, update in updates.items():
                where = f"{component}.{module}"
                if not component.isidentifier() or not _MODULE.fullmatch(module):
                    raise ConceptError("the name of the layer is invalid", where=where)
                self._check_update(update, where)
                widths.add(str(update.shape[1]))
        if self.info.method == "orthogonal" and widths != set(self.info.slices):
            raise ConceptError(
                f"the slices have the widths {_join(self.info.slices)}, "
                f"but the layers have {_join(widths)}",
                where="slices",
            )
        if bool(self.embeddings) != bool(self.info.num_tokens):
            raise ConceptError(
                f"the concept has {plural(self.info.num_tokens, 'token')} and "
                f"{plural(len(self.embeddings), 'set')} of embeddings"
            )
        count, layers = self.info.num_tokens, self.info.token_layers
        leading = (count, layers) if layers else (count,)
        for key, rows in self.embeddings.items():
            if rows.shape[:-1] != leading or rows.shape[-1] < 1:
                raise ConceptError(
                    f"embeddings of shape {tuple(rows.shape)} do not fit {plural(count, 'token')}"
                    + (f" in {plural(layers, 'layer')}" if layers else ""),
                    where=key,
                )
            _check_values(rows, key)

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """The subject of the trigger's token embeddings; empty without tokens."""
        info = self.info
        if not self.embeddings:
            return ()
        return (Subject(info.name, info.trigger, info.class_word, self.embeddings),)

    def _check_update(self, update: LowRank, where: str) -> None:
        if update.rank != self.info.rank:
            raise ConceptError(
                f"the update has rank {update.rank}, not {self.info.rank}", where=where
            )
        if update.scale != self.info.scale:
            raise ConceptError(
                f"the update has scale {update.scale}, not alpha / rank = {self.info.scale}",
                where=where,
            )
        _check_values(update.up, where)
        _check_values(update.down, where)

    def __repr__(self) -> str:
        info = self.info
        tokens = plural(info.num_tokens, "token") if info.num_tokens else "no tokens"
        return (
            f"Concept({info.name}: {info.trigger}, a {info.class_word}, {tokens}; family "
            f"{info.family}, base {info.base}; {info.method}, rank {info.rank}; "
            f"{describe_layer_counts(self.updates)})"
        )

    def renamed(self, name: str) -> Concept:
        """A copy with another name and the trigger ``<name>``.

        Raises:
            ConceptError: If the name is invalid.
        """
        facts = self.info.model_dump() | {"name": name, "trigger": f"<{name}>"}
        return replace(self, info=parse_info(facts, "names"))


@dataclass(frozen=True, eq=False)
class VectorUpdate:
    """The change of a bias or of the weight of a norm.

    Attributes:
        values: (n,), float32.
        is_replacement: Whether the values replace the parameter, or are added to it.
    """

    values: Tensor
    is_replacement: bool = False


#: component -> parameter name in the model, such as "blocks.0.norm2.weight" -> update.
VectorUpdates = Mapping[str, Mapping[str, VectorUpdate]]


@dataclass(frozen=True)
class LoraInfo:
    """The facts about a LoRA of another program, or about a merge.

    The fields from ``class_word`` on are those of :class:`ConceptInfo`.

    Attributes:
        name: The name, made from the file's name.
        family: Name of the model family; empty until the model is known.
        base: The base model in the file's metadata; empty if it names none.
        rank: The largest rank of a layer.
        trigger_words: The words for a prompt in the file's metadata; of a merge, its triggers.
        fingerprint: Architecture of a merge's base; empty for other LoRAs.
        triggers: Triggers with token embeddings; only merges have them.
    """

    name: str
    family: str
    base: str
    rank: int
    trigger_words: str = ""
    class_word: str = ""
    trigger: str = ""
    method: Method = "lora"
    basis: None = None
    slices: Mapping[str, Sequence[int]] = field(default_factory=dict)
    fingerprint: Mapping[str, Any] = field(default_factory=dict, repr=False)
    num_tokens: int = 0
    token_layers: int = 0
    training: Mapping[str, Any] = field(default_factory=dict)
    trained_with: Sequence[str] = ()
    triggers: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class Lora:
    """The updates of a LoRA of another program, or of a merge.

    Attributes:
        info: Facts about the LoRA.
        updates: Component -> module name, as in files -> update; ranks and scales may differ
            between layers.
        subjects: Triggers with token embeddings; only merges have them.
        vector_updates: Changes of biases and norms.
        source: The file that the LoRA was read from; None if only part of it was.
    """

    info: LoraInfo
    updates: Mapping[str, Mapping[str, LowRank]]
    subjects: Sequence[Subject] = ()
    vector_updates: VectorUpdates = field(default_factory=dict)
    source: Path | None = None

    def __repr__(self) -> str:
        info = self.info
        words = info.trigger_words or "no trigger words"
        return (
            f"Lora({info.name}: {words}; family {info.family}, base {info.base or 'unknown'}; "
            f"rank {info.rank}; {describe_layer_counts(self.updates)})"
        )

    def renamed(self, name: str) -> Lora:
        """A copy with another name; a merge of several concepts keeps their triggers.

        Raises:
            ConceptError: If the name is invalid.
        """
        if not re.fullmatch(NAME_PATTERN, name):
            raise ConceptError(
                f"invalid concept name {quote(name)}",
                where="names",
                fix="use up to 64 of the characters a-z, 0-9, _ and -, a letter or digit first",
            )
        info = replace(self.info, name=name)
        if len(self.subjects) != 1:
            return replace(self, info=info)
        # A single subject gets the trigger of the new name, as a concept does.
        subject = replace(self.subjects[0], name=name, trigger=f"<{name}>")
        info = replace(info, trigger_words=subject.trigger, triggers=(subject.trigger,))
        return replace(self, info=info, subjects=(subject,))


#: Everything that can be attached to a pipeline and merged.
Adaptation = Concept | Lora


def describe_layer_counts(parts: Mapping[str, Mapping[str, object]]) -> str:
    """The number of layers of each component as text: ``layers: 32 of unet``."""
    counts = (f"{len(layers)} of {component}" for component, layers in sorted(parts.items()))
    return f"layers: {', '.join(counts) or 'none'}"


def _check_values(values: Tensor, where: str) -> None:
    if values.dtype not in _DTYPES:
        raise ConceptError(
            f"unsupported dtype {values.dtype}",
            where=where,
            fix="use float32, float16 or bfloat16",
        )
    if not all_finite(values):
        raise ConceptError("a value is NaN or infinite", where=where, fix="train the concept again")


def _join(values: Iterable[str]) -> str:
    return ", ".join(sorted(values, key=str)) or "none"

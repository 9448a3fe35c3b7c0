"""The ``ignore=`` argument: parts of files and concepts to leave out.

A selector is a component of a diffusers pipeline (also one that takes no adapter, such as a T5), a
kind of part ("bias", "norm", "embedding"), or a pattern of keys with a ``*``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import Tensor

from customize.concepts.formats.layer_names import match_text_encoder
from customize.concepts.formats.lora_file import LoraFile
from customize.concepts.formats.tensor_group import TensorGroup
from customize.concepts.formats.tensor_keys import parse_key
from customize.concepts.types import Adaptation, Concept, Lora
from customize.core.lowrank import LowRank
from customize.errors import ConceptError, ConfigError
from customize.near_names import suggest_names

Value = TypeVar("Value")

COMPONENTS = (
    *("unet", "transformer", "transformer_2"),
    *("text_encoder", "text_encoder_2", "text_encoder_3"),
)
KINDS = ("bias", "norm", "embedding")
# Result of match_text_encoder -> names of the component in diffusers. In FLUX the T5 is second.
_ENCODERS = {
    "text encoder": {"text_encoder"},
    "second text encoder": {"text_encoder_2"},
    "T5": {"text_encoder_2", "text_encoder_3"},
}
_NORM_NAME = re.compile(r"(.*[._])?[a-z]*norm[a-z0-9_]*")


def check_ignore(ignore: str | Iterable[str] | None) -> tuple[str, ...]:
    """Check an ``ignore=`` argument.

    Returns:
        The selectors.

    Raises:
        ConfigError: If one is not a component, kind or pattern.
    """
    words = (ignore,) if isinstance(ignore, str) else tuple(ignore or ())
    for word in words:
        if not isinstance(word, str) or (word not in (*COMPONENTS, *KINDS) and "*" not in word):
            raise ConfigError(
                f"unknown part {word!r}",
                where="ignore",
                fix=_suggest_fix(word),
            )
    return words


def _suggest_fix(word: object) -> str:
    if isinstance(word, str) and "," in word:
        return f"give a list: {[w.strip() for w in word.split(',')]}"
    return (
        f'{suggest_names(word, (*COMPONENTS, *KINDS))}, or give a pattern of keys such as "*.ff.*"'
    )


def check_all_matched(words: Sequence[str], matched: set[str]) -> None:
    """Check that each selector matched something.

    Args:
        words: The selectors.
        matched: Those that matched.

    Raises:
        ConfigError: If one did not.
    """
    unmatched = [word for word in words if word not in matched]
    if unmatched:
        raise ConfigError(
            f"no loaded part matches {', '.join(unmatched)}",
            where="ignore",
            fix="remove or correct it",
        )


def filter_tensors(
    tensors: Mapping[str, Tensor], words: Sequence[str], matched: set[str], where: object
) -> dict[str, Tensor]:
    """The tensors of a file that no selector matches.

    Args:
        tensors: Key -> tensor.
        words: The selectors.
        matched: Selectors that match are added to it.
        where: Path of the file, for messages.

    Raises:
        ConceptError: If all tensors are left out.
    """
    remaining = {}
    for key, tensor in tensors.items():
        hits = [word for word in words if _matches(word, key, tensor)]
        matched.update(hits)
        if not hits:
            remaining[key] = tensor
    if not remaining and tensors:
        raise ConceptError("ignore leaves out all of the file", where=where, fix="name fewer parts")
    return remaining


def remove_ignored(
    concept: Adaptation | LoraFile, words: Sequence[str], matched: set[str]
) -> Adaptation | LoraFile:
    """Leave out parts of a concept or LoRA in memory.

    Args:
        concept: The concept or LoRA, which is not modified.
        words: The selectors.
        matched: Selectors that match are added to it.

    Raises:
        ConceptError: If all of it is left out.
    """
    if not words:
        return concept
    if isinstance(concept, LoraFile):
        before = len(concept.groups)
        groups = _filter_groups(concept, words, matched)
        return replace(
            concept, groups=groups, is_partial=concept.is_partial or len(groups) < before
        )
    updates = _filter_updates(concept.updates, words, matched)
    reduced: Adaptation
    if isinstance(concept, Lora):
        reduced = replace(
            concept,
            updates=updates,
            vector_updates=_filter_updates(concept.vector_updates, words, matched),
        )
        is_empty = not reduced.updates and not reduced.vector_updates
    else:
        is_empty = not updates
        reduced = concept if is_empty else _with_updates(concept, updates)
    if sum(map(len, updates.values())) < sum(map(len, concept.updates.values())):
        reduced = replace(reduced, source=None)  # recorded inputs beside it belong to all layers
    if is_empty:
        raise ConceptError(
            f"ignore leaves out all of {concept.info.name}", where="ignore", fix="name fewer parts"
        )
    return reduced


def _with_updates(concept: Concept, updates: Mapping[str, Mapping[str, LowRank]]) -> Concept:
    """The concept with some of its updates, and the slices of their widths."""
    widths = {str(update.shape[1]) for layers in updates.values() for update in layers.values()}
    slices = {width: s for width, s in concept.info.slices.items() if width in widths}
    info = concept.info.model_copy(update={"slices": slices})
    return replace(concept, info=info, updates=updates)


def _filter_updates(
    parts: Mapping[str, Mapping[str, Value]], words: Sequence[str], matched: set[str]
) -> dict[str, dict[str, Value]]:
    remaining: dict[str, dict[str, Value]] = {}
    for component, component_parts in parts.items():
        for name, value in component_parts.items():
            key = f"{component}.{name}"
            module, _, leaf = name.rpartition(".")
            kinds = {component}
            if leaf in ("weight", "bias"):  # a parameter, not a module
                kinds |= {"bias"} if leaf == "bias" else set()
                kinds |= {"norm"} if leaf == "weight" or _NORM_NAME.fullmatch(module) else set()
            hits = [w for w in words if w in kinds or ("*" in w and fnmatchcase(key, w))]
            matched.update(hits)
            if not hits:
                remaining.setdefault(component, {})[name] = value
    return remaining


def _filter_groups(file: LoraFile, words: Sequence[str], matched: set[str]) -> list[TensorGroup]:
    keys = {key: group.parts[part] for group in file.groups for part, key in group.keys.items()}
    remaining = filter_tensors(keys, words, matched, file.where)
    groups = []
    for group in file.groups:
        names = {part: key for part, key in group.keys.items() if key in remaining}
        if names:
            parts = {part: group.parts[part] for part in names}
            groups.append(replace(group, parts=parts, keys=names))
    return groups


def _matches(word: str, key: str, tensor: Tensor) -> bool:
    path, part = parse_key(key)
    if word == "embedding":
        return key.startswith("bundle_emb.")
    if word == "bias":
        return part in ("diff_b", "b_norm", "up_bias", "down_bias", "bias") or key.endswith(".bias")
    if word == "norm":
        named = bool(_NORM_NAME.fullmatch(path or key.rpartition(".")[0])) and tensor.ndim < 2
        return part in ("w_norm", "b_norm", "norm_scale") or (named and part != "alpha")
    if word in COMPONENTS:
        encoder = match_text_encoder(key)
        if encoder is not None:
            return word in _ENCODERS[encoder]
        bare = re.sub(r"^(lora_|lycoris_)", "", key)
        if re.match(r"transformer_2[._]", bare):
            return word == "transformer_2"
        return word in ("unet", "transformer") and not key.startswith("bundle_emb.")
    return fnmatchcase(key, word)

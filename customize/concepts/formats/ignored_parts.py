"""Leaving out parts of a file by the user's own word, never silently.

A word is a component (as diffusers calls it, also one that takes no adapter here, such as a T5), a
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
#: Result of :func:`match_text_encoder` -> names of the component in diffusers (FLUX: T5 second).
_ENCODERS = {
    "text encoder": {"text_encoder"},
    "second text encoder": {"text_encoder_2"},
    "T5": {"text_encoder_2", "text_encoder_3"},
}
_NORM_NAME = re.compile(r"(.*[._])?[a-z]*norm[a-z0-9_]*")


def check_ignore(ignore: str | Iterable[str] | None) -> tuple[str, ...]:
    """The words of an ``ignore`` argument.

    Raises:
        ConfigError: one is no component, kind or pattern.
    """
    words = (ignore,) if isinstance(ignore, str) else tuple(ignore or ())
    for word in words:
        if not isinstance(word, str) or (word not in (*COMPONENTS, *KINDS) and "*" not in word):
            raise ConfigError(
                f"{word!r} is no part of a file that can be left out",
                where="ignore",
                fix=_suggest_fix(word),
            )
    return words


def _suggest_fix(word: object) -> str:
    if isinstance(word, str) and "," in word:
        return f"give a list with each word by itself: {[w.strip() for w in word.split(',')]}"
    return (
        f'{suggest_names(word, (*COMPONENTS, *KINDS))}, or give a pattern of keys such as "*.ff.*"'
    )


def check_all_matched(words: Sequence[str], matched: set[str]) -> None:
    """Refuse words that left nothing out.

    Raises:
        ConfigError: naming them.
    """
    idle = [word for word in words if word not in matched]
    if idle:
        raise ConfigError(
            f"nothing in what is loaded belongs to {', '.join(idle)}",
            where="ignore",
            fix="take it out of ignore, or correct it",
        )


def filter_tensors(
    tensors: Mapping[str, Tensor], words: Sequence[str], matched: set[str], where: object
) -> dict[str, Tensor]:
    """The tensors of a file that no word leaves out.

    Args:
        matched: words that leave something out are added to it.

    Raises:
        ConceptError: nothing is left.
    """
    kept = {}
    for key, tensor in tensors.items():
        hits = [word for word in words if _matches(word, key, tensor)]
        matched.update(hits)
        if not hits:
            kept[key] = tensor
    if not kept and tensors:
        raise ConceptError("ignore leaves nothing of the file", where=where, fix="name fewer parts")
    return kept


def remove_ignored(
    concept: Adaptation | LoraFile, words: Sequence[str], matched: set[str]
) -> Adaptation | LoraFile:
    """A concept or LoRA that is in memory already, without what the words name.

    Raises:
        ConceptError: nothing is left.
    """
    if not words:
        return concept
    if isinstance(concept, LoraFile):
        before = len(concept.groups)
        groups = _filter_groups(concept, words, matched)
        return replace(
            concept, groups=groups, is_partial=concept.is_partial or len(groups) < before
        )
    products = _filter_updates(concept.updates, words, matched)
    left: Adaptation
    if isinstance(concept, Lora):
        left = replace(
            concept,
            updates=products,
            vector_updates=_filter_updates(concept.vector_updates, words, matched),
        )
        empty = not left.updates and not left.vector_updates
    else:
        empty = not products
        left = concept if empty else _with_products(concept, products)
    if sum(map(len, products.values())) < sum(map(len, concept.updates.values())):
        left = replace(left, source=None)  # what lies beside it is a record of the whole
    if empty:
        raise ConceptError(
            f"ignore leaves nothing of {concept.info.name}", where="ignore", fix="name fewer parts"
        )
    return left


def _with_products(concept: Concept, products: Mapping[str, Mapping[str, LowRank]]) -> Concept:
    """The concept with these of its updates, and the slices of their widths."""
    widths = {str(update.shape[1]) for own in products.values() for update in own.values()}
    slices = {width: own for width, own in concept.info.slices.items() if width in widths}
    info = concept.info.model_copy(update={"slices": slices})
    return replace(concept, info=info, updates=products)


def _filter_updates(
    parts: Mapping[str, Mapping[str, Value]], words: Sequence[str], matched: set[str]
) -> dict[str, dict[str, Value]]:
    kept: dict[str, dict[str, Value]] = {}
    for component, own in parts.items():
        for name, value in own.items():
            key = f"{component}.{name}"
            module, _, leaf = name.rpartition(".")
            kinds = {component}
            if leaf in ("weight", "bias"):  # a parameter, not a module
                kinds |= {"bias"} if leaf == "bias" else set()
                kinds |= {"norm"} if leaf == "weight" or _NORM_NAME.fullmatch(module) else set()
            hits = [w for w in words if w in kinds or ("*" in w and fnmatchcase(key, w))]
            matched.update(hits)
            if not hits:
                kept.setdefault(component, {})[name] = value
    return kept


def _filter_groups(file: LoraFile, words: Sequence[str], matched: set[str]) -> list[TensorGroup]:
    keys = {key: group.parts[part] for group in file.groups for part, key in group.keys.items()}
    kept = filter_tensors(keys, words, matched, file.where)
    groups = []
    for group in file.groups:
        names = {part: key for part, key in group.keys.items() if key in kept}
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

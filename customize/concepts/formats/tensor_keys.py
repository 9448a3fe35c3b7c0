"""Parsing the keys of an adapter file: which layer a key belongs to, and which part it stores."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from customize.concepts.formats import decoders
from customize.concepts.formats.bias_and_norm_updates import VECTOR_KEY_SUFFIXES
from customize.concepts.formats.decoders import UpdateFormat
from customize.concepts.formats.tensor_group import TensorGroup, join_names
from customize.errors import ConceptError

# Training state of peft's adapters without effect on inference: VeLoRA's projections for the
# backward pass, and MonteCLoRA's noise.
_TRAINING_ONLY = re.compile(r".+\.(lora_velora_embed|lora_monteclora_sampler)(\..+)?")

# A vector with such a key is the trained weight of a norm, as of peft's modules_to_save.
_TRAINED_NORM = re.compile(r"(?P<path>(?!.*\.lora_).+)\.weight")

# Unsupported part -> pattern of the keys that store it.
_UNSUPPORTED = {
    "norm in place of the base's": re.compile(r".+\.set_weight"),
    "bundled embedding": re.compile(r"bundle_emb\..+"),
    "update of older peft's OFT": re.compile(r".+\.oft_r(\..+)?"),
    "update of IA3 or GLoRA": re.compile(r".+\.(on_input|[ab][12]\.weight)"),
    "row of a text encoder's embeddings": re.compile(r".+\.trainable_tokens_(delta|original).*"),
    "copy of a whole module's weight": re.compile(r"(?!.*\.lora_).+(?<!norm)\.weight"),
}


def group_by_layer(tensors: Mapping[str, Tensor], where: object) -> list[TensorGroup]:
    """Group the tensors of a file by layer, in the order of their keys.

    Args:
        tensors: Key -> tensor.
        where: Path of the file, for messages.

    Raises:
        ConceptError: If a key is unknown, or two keys store the same part of a layer.
    """
    groups: dict[str, TensorGroup] = {}
    unknown = []
    for key in sorted(tensors):
        path, part = parse_key(key)
        if not part and tensors[key].ndim == 1 and (trained := _TRAINED_NORM.fullmatch(key)):
            path, part = trained["path"], "norm_scale"
        if not part and _TRAINING_ONLY.fullmatch(key):
            continue
        if not part:
            unknown.append(key)
            continue
        group = groups.setdefault(path, TensorGroup(path))
        if part in group.parts:
            raise ConceptError(
                f"the keys {group.keys[part]} and {key} store the same part of one layer",
                where=where,
                fix="get the file from its maker again, or keep one adapter in it",
            )
        group.parts[part] = tensors[key]
        group.keys[part] = key
    if unknown:
        kinds = {
            kind for kind, pattern in _UNSUPPORTED.items() if any(map(pattern.fullmatch, unknown))
        }
        kind_list = f" ({', '.join(sorted(kinds))})" if kinds else ""
        raise ConceptError(
            f"{len(unknown)} of {len(tensors)} keys are not supported{kind_list}, and a file is "
            f"not loaded in part: {join_names(unknown)}",
            where=where,
            fix=_suggest_fix(kinds, unknown),
        )
    return list(groups.values())


def parse_key(key: str) -> tuple[str, str]:
    """Split a key into the path of the layer and the part; both are empty for an unknown key."""
    return _parse_key(key, decoders.FORMATS)


@functools.lru_cache(maxsize=2**14)  # the files of a merge mostly have the same keys
def _parse_key(key: str, formats: tuple[UpdateFormat, ...]) -> tuple[str, str]:
    match = _compile_pattern(formats).fullmatch(key)
    if match is None:
        return "", ""
    part = next(part for part, value in match.groupdict().items() if value and part != "path")
    return match["path"], part


@functools.cache
def _compile_pattern(formats: tuple[UpdateFormat, ...]) -> re.Pattern[str]:
    """A pattern with a group for the path and one for each part of the formats."""
    suffixes = {"alpha": (".alpha",), **VECTOR_KEY_SUFFIXES}
    for update_format in formats:
        suffixes |= update_format.key_suffixes
    alternatives = "|".join(
        f"(?P<{part}>{'|'.join(_escape_suffix(suffix) for suffix in part_suffixes)})"
        for part, part_suffixes in suffixes.items()
    )
    # Each suffix begins with a dot or underscore; to test that first is several times as fast.
    return re.compile(f"(?P<path>.+?)(?=[._])(?:{alternatives})")


def _escape_suffix(suffix: str) -> str:
    return re.escape(suffix).replace(r"\*", "[A-Za-z0-9_-]+")


def _suggest_fix(kinds: set[str], unknown: Sequence[str]) -> str:
    if kinds == {"bundled embedding"}:
        return (
            "save the embeddings in a file of their own and load that with "
            'load_textual_inversion; or leave them out: ignore=["embedding"]'
        )
    patterns = sorted({"*." + ".".join(key.split(".")[-3:]) for key in unknown if "." in key})
    few = patterns if 0 < len(patterns) <= 3 and max(map(len, patterns)) < 100 else []
    words = f"ignore={few}".replace("'", '"') if few else "ignore= with patterns of their keys"
    return (
        "ask its maker for the adapter as LoRA, LoHa, LoKr, OFT or DoRA without other parts, or "
        f"leave them out: {words}"
    )

"""Alpha from the header keys of other trainers, for layers without an alpha tensor."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from customize.concepts.concept_info import MAX_NAME
from customize.concepts.formats.layer_updates import visible_rank
from customize.concepts.formats.tensor_group import TensorGroup
from customize.text import one_line

_KOHYA = "ss_network_alpha"
_ALPHAS = (_KOHYA, "network_alpha", "lora_alpha", "alpha")
_RANKS = ("ss_network_dim", "network_dim", "lora_rank", "lora_dim", "rank", "dim", "r")
# JSON: name of a layer or of its alpha -> number.
_BY_LAYER = "network_alphas"
# Names in kohya's ``ss_network_args`` that set the rank or alpha of some layers.
_PER_LAYER_ARGUMENT = re.compile(r"(?!.*dropout).*(alpha|dim|rank|rs_?lora|scale)", re.IGNORECASE)


def apply_header_alphas(
    groups: Sequence[TensorGroup], header: Mapping[str, str], where: object
) -> Sequence[TensorGroup]:
    """Add the header's alpha to layers without one.

    One number applies to all layers if no layer has an alpha of its own, all have the stated rank
    (or the same one if none is stated), and the file does not combine kohya's header with
    diffusers' keys, whose converters multiply alpha into the tensors. Otherwise alpha is the rank,
    with a warning that the header's alpha is not used.

    Args:
        groups: The layers of the file.
        header: The safetensors header.
        where: Path of the file, for the warning.
    """
    bare = [group for group in groups if "alpha" not in group.parts and _has_product(group)]
    if not bare:
        return groups
    by_layer = _parse_layer_alphas(header)
    if by_layer and all(group.path in by_layer for group in bare):
        return _add_alphas(groups, {group.path: by_layer[group.path] for group in bare})
    stated = {key: header[key] for key in _ALPHAS if _is_set(header.get(key))}
    ranks = {visible_rank(group) for group in bare}
    numbers = {_parse_number(text) for text in stated.values()}
    if (not stated and not by_layer) or ranks == numbers:
        return groups
    reason = _explain_ambiguity(groups, bare, header, stated, numbers, ranks)
    if reason:
        keys = ", ".join(f"{key}={stated[key][:MAX_NAME]}" for key in stated) or _BY_LAYER
        file = one_line(str(where))
        warnings.warn(
            f"{file}: the header has {keys}, which is not used because {reason}; alpha is set "
            "to the rank",
            stacklevel=2,
        )
        return groups
    (alpha,) = numbers
    return _add_alphas(groups, {group.path: alpha for group in bare})


def _explain_ambiguity(
    groups: Sequence[TensorGroup],
    bare: Sequence[TensorGroup],
    header: Mapping[str, str],
    stated: Mapping[str, str],
    numbers: set[float],
    ranks: set[int | None],
) -> str:
    """Why the header's alpha does not apply to all layers; empty if it does."""
    if len(numbers) != 1 or math.nan in numbers or not all(map(math.isfinite, numbers)):
        return "it is not one number for all layers"
    if len(bare) < sum(map(_has_product, groups)):
        return "other layers have an alpha of their own"
    nominal = {_parse_number(header[key]) for key in _RANKS if _is_set(header.get(key))}
    if len(ranks) != 1 or None in ranks or nominal - ranks:
        return "the layers do not all have the rank that it belongs to"
    if _PER_LAYER_ARGUMENT.match(header.get("ss_network_args", "")):
        return "ss_network_args sets another alpha for some layers"
    converted = any(".lora_A" in group.keys.get("down", "") for group in bare)
    if stated.keys() == {_KOHYA} and converted:
        return "the file uses diffusers' keys, whose converters multiply alpha into the tensors"
    return ""


def _has_product(group: TensorGroup) -> bool:
    return visible_rank(group) is not None


def _is_set(text: str | None) -> bool:
    return text is not None and text.strip() not in ("", "None", "null")


def _parse_number(text: str) -> float:
    """Parse an alpha or rank; ``math.nan`` itself, for membership tests, if it is invalid."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if 0 <= value < math.inf else math.nan


def _parse_layer_alphas(header: Mapping[str, str]) -> dict[str, float]:
    try:
        alphas = json.loads(header.get(_BY_LAYER, "{}"))
        values = {str(key).removesuffix(".alpha"): float(value) for key, value in alphas.items()}
    except (AttributeError, OverflowError, RecursionError, TypeError, ValueError):
        return {}
    return values if all(map(math.isfinite, values.values())) else {}


def _add_alphas(groups: Iterable[TensorGroup], alphas: Mapping[str, float]) -> list[TensorGroup]:
    return [
        replace(
            group,
            parts={**group.parts, "alpha": torch.tensor(alphas[group.path])},
            keys={**group.keys, "alpha": "the header's alpha"},
        )
        if group.path in alphas
        else group
        for group in groups
    ]

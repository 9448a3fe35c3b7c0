"""``--weights``, ``--names`` and ``--ignore``: one value per concept, as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from customize.errors import ConfigError
from customize.text import plural

if TYPE_CHECKING:
    from customize.concepts.formats.lora_file import LoraFile
    from customize.concepts.types import Adaptation

#: A weight for each concept in order, or a nested dict as :func:`customize.load_custom` takes it.
WeightArgument = list[float] | dict[str, Any]


def parse_weights(text: str | None, count: int) -> WeightArgument:
    """Parse ``"1,0.8"`` or ``"rex=0.8,rex.text_encoder=0.5,rex.unet.up.block_1=0.4/0.8/1"``.

    Args:
        text: Value of the flag; None: weight 1 for each concept.
        count: Number of concepts.

    Raises:
        ConfigError: The text has neither form, or names a weight twice.
    """
    if text is None or "=" not in text:
        return parse_weight_list(text, count)
    weights: dict[str, Any] = {}
    for part in text.split(","):
        path, _, value = part.partition("=")
        keys = [key.strip() for key in path.split(".")]
        try:
            numbers = [float(number) for number in value.split("/")]
        except ValueError:
            numbers = []
        if not numbers or not all(keys):
            raise ConfigError(
                f"invalid weight {part.strip()!r}",
                where="--weights",
                fix="write for example --weights rex=0.8,rex.text_encoder=0.5,rex.unet.down=0.8",
            )
        level = weights
        for key in keys:
            level = level.setdefault(key, {})
        if "" in level:
            raise ConfigError(
                f"two weights for {path.strip()}", where="--weights", fix="remove one of them"
            )
        level[""] = numbers if len(numbers) > 1 else numbers[0]
    return {name: _flatten(value) for name, value in weights.items()}


def _flatten(value: Mapping[str, Any]) -> Any:
    """Replace dicts that contain one number by the number."""
    if set(value) == {""}:
        return value[""]
    return {key: inner if key == "" else _flatten(inner) for key, inner in value.items()}


def parse_weight_list(text: str | None, count: int) -> list[float]:
    """Parse ``"1,0.8"``, one finite number per concept; None: 1 for each.

    Raises:
        ConfigError: A part is not a finite number, or there are not ``count`` of them.
    """
    if text is None:
        return [1.0] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = [math.nan]
    if not all(map(math.isfinite, weights)):
        raise ConfigError(
            f"invalid weights {text!r}",
            where="--weights",
            fix="write comma-separated numbers, for example --weights 1,0.8",
        )
    if len(weights) != count:
        raise ConfigError(
            f"{plural(len(weights), 'weight')} for {plural(count, 'concept')}",
            where="--weights",
            fix="give one weight per concept, in the same order",
        )
    return weights


def rename_concepts(
    concepts: Sequence[Adaptation | LoraFile], text: str | None
) -> list[Adaptation | LoraFile]:
    """Rename concepts by a text such as ``"rex,,tom-2"``; empty parts and None keep the names.

    Raises:
        ConfigError: The number of names differs from the number of concepts.
        ConceptError: A name is not valid for a concept.
    """
    from dataclasses import replace

    from customize.concepts.formats.lora_file import LoraFile, name_from_file

    if text is None:
        return list(concepts)
    names = [name.strip() for name in text.split(",")]
    if len(names) != len(concepts):
        raise ConfigError(
            f"{plural(len(names), 'name')} for {plural(len(concepts), 'concept')}",
            where="--names",
            fix="give one name per concept, in the same order; leave it empty to keep the name",
        )
    renamed: list[Adaptation | LoraFile] = []
    for concept, name in zip(concepts, names, strict=True):
        if not name:
            renamed.append(concept)
        elif isinstance(concept, LoraFile):
            renamed.append(replace(concept, name=name_from_file(name)))
        else:
            renamed.append(concept.renamed(name))
    return renamed


def split_parts(text: str | None) -> tuple[str, ...]:
    """Split the value of ``--ignore`` at its commas."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())

"""Checks and conversions of the values of single settings; each raises ValueError if invalid."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from customize.core.preservation import PRESERVATIONS
from customize.near_names import did_you_mean
from customize.safe_read import PICKLE_SUFFIXES
from customize.text import quote


def normalize_value(name: str, value: Any, types: Sequence[Any]) -> Any:
    """Convert a value from YAML or a shell, and refuse values that pydantic would coerce.

    Args:
        name: The setting.
        value: Its value.
        types: The setting's possible types.
    """
    if dict[str, float] in types:
        return parse_weights(value, "class_text=1,output=0.5" if name == "preserve" else "clip=1")
    if dict[str, str] in types:
        return parse_names(value)
    if isinstance(value, bool) and bool not in types:
        if name == "mixed_precision" and not value:
            return "no"  # YAML 1.1 reads a plain no as false
        raise ValueError("should not be yes or no")
    if name == "system" and isinstance(value, str):
        return value  # lines of a message, or none
    if isinstance(value, str):
        if value.strip().lower() in ("none", "null") and type(None) in types:
            return None
        check_text(value)
        value = value.strip()
        return (value,) if tuple[str, ...] in types else value
    return value


def expand_home(path: Path | None) -> Path | None:
    """Replace a leading ``~`` with the home folder."""
    try:
        return None if path is None else path.expanduser()
    except RuntimeError:
        raise ValueError("starts with a home folder that does not exist") from None


def check_not_pickle(base: str) -> str:
    """Refuse a base that is a pickle file."""
    if base.lower().endswith(PICKLE_SUFFIXES):
        raise ValueError("is a pickle, which can run code; use a safetensors file or folder")
    return base


def check_placeholder(caption: str | None) -> str | None:
    """Refuse a caption template without {} for the trigger."""
    if caption is not None and "{}" not in caption:
        raise ValueError('has no {} for the trigger; write "a photo of {}"')
    return caption


def check_preservation_weights(weights: dict[str, float]) -> dict[str, float]:
    """Return the non-zero weights in the order of :data:`PRESERVATIONS`."""
    unknown = sorted(weights.keys() - set(PRESERVATIONS))
    if unknown:
        known = ", ".join(PRESERVATIONS)
        hint = did_you_mean(unknown[0], PRESERVATIONS)
        if "prior" in unknown:
            hint = "the weight of class images is prior_weight"
        names = ", ".join(map(format_value, unknown))
        raise ValueError(f"has unknown losses: {names}; choose from {known}{hint and '; ' + hint}")
    negative = sorted(name for name, weight in weights.items() if weight < 0)
    if negative:
        raise ValueError(f"has a negative weight for {', '.join(negative)}; use 0 or more")
    return {name: weights[name] for name in PRESERVATIONS if weights.get(name)}


def check_phrases(phrases: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse phrases that are empty, unprintable or without {} for the trigger."""
    for phrase in check_prompts(phrases):
        if "{}" not in phrase:
            raise ValueError(f"has no {{}} for the trigger in {format_value(phrase)}")
    return phrases


def check_prompts(prompts: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse prompts that are empty or unprintable."""
    for prompt in prompts:
        check_text(prompt)
    return prompts


def check_text(text: str) -> None:
    """Refuse an empty text and control characters."""
    if not text.strip():
        raise ValueError("is empty")
    if not text.isprintable():
        raise ValueError("has control characters")


def parse_weights(value: Any, example: str) -> Any:
    """Parse weights from a shell, ``["a=1,b=.5"]``, to a mapping; ``none`` gives an empty one.

    Other values, such as mappings, are returned unchanged.

    Args:
        value: The value.
        example: An example for the error.
    """
    if isinstance(value, str):
        value = [value]
    if value is None or not isinstance(value, list | tuple):
        return {} if value is None else value
    weights: dict[str, str] = {}
    for pair in ",".join(map(str, value)).split(","):
        name, equals, weight = (part.strip() for part in pair.partition("="))
        if name.lower() in ("none", "null") and not equals:
            continue
        if not name or not weight:
            raise ValueError(f"should be names with weights, such as {example}")
        if name in weights:
            raise ValueError(f"gives {name} more than one weight")
        weights[name] = weight
    return weights


def parse_names(value: Any) -> Any:
    """Parse names from a shell, ``["a=x", "b=y"]``, to a mapping; values may have commas.

    Other values, such as mappings, are returned unchanged.
    """
    if value is None or not isinstance(value, str | list | tuple):
        return {} if value is None else value
    names: dict[str, str] = {}
    for pair in [value] if isinstance(value, str) else map(str, value):
        name, _, text = (part.strip() for part in pair.partition("="))
        if not name or not text:
            raise ValueError("should be names with values, such as clip=folder")
        if name in names:
            raise ValueError(f"gives {name} more than one value")
        names[name] = text
    return names


def contains_trigger(text: str, trigger: str) -> bool:
    """Whether a text contains a trigger, ignoring case.

    :func:`customize.concepts.tokens.token_rows.expand_prompt` finds triggers in the same way.
    """
    return re.search(re.escape(trigger), text, re.IGNORECASE) is not None


def format_value(value: object) -> str:
    """Format a setting's value for an error message, in at most 60 characters."""
    return quote(str(value) if isinstance(value, Path) else value, 60)

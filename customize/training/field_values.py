"""What the values of single settings may be; each function refuses others with a ValueError."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from customize.near_names import did_you_mean
from customize.training.settings_file import check_text, format_value, parse_weights

# Named here, and not read from customize.core.preservation, so that --help needs no torch.
TEXT_LOSSES = ("class_text", "context_text")
PRESERVATIONS = (*TEXT_LOSSES, "output", "context_output")
# Checkpoints of these kinds are pickles, which run code when they are opened.
_PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl", ".pickle")


def normalize_value(name: str, value: Any, kinds: Sequence[Any]) -> Any:
    """Undo what YAML and shells do to values, and refuse what pydantic would bend.

    Args:
        name: the setting's.
        kinds: the types that it may have.
    """
    if name == "preserve":
        return parse_weights(value)
    if isinstance(value, bool) and bool not in kinds:
        if name == "mixed_precision" and not value:
            return "no"  # YAML 1.1 reads a plain no as false
        raise ValueError("should not be yes or no")
    if isinstance(value, str):
        if value.strip().lower() in ("none", "null") and type(None) in kinds:
            return None
        check_text(value)
        value = value.strip()
        return (value,) if tuple[str, ...] in kinds else value
    return value


def expand_home(path: Path | None) -> Path | None:
    """The path with ``~`` as the home folder."""
    try:
        return None if path is None else path.expanduser()
    except RuntimeError:
        raise ValueError("starts with a home folder that does not exist") from None


def check_not_pickle(base: str) -> str:
    if base.lower().endswith(_PICKLES):
        raise ValueError("is a pickle, which can run code; give a safetensors file or folder")
    return base


def check_placeholder(caption: str | None) -> str | None:
    if caption is not None and "{}" not in caption:
        raise ValueError('has no {} for the trigger; write "a photo of {}"')
    return caption


def check_preservation_weights(weights: dict[str, float]) -> dict[str, float]:
    """The weights that are not zero, in the order of :data:`PRESERVATIONS`."""
    unknown = sorted(weights.keys() - set(PRESERVATIONS))
    if unknown:
        known = ", ".join(PRESERVATIONS)
        hint = "; class pictures have prior_weight" if "prior" in unknown else ""
        near_ones = did_you_mean(unknown[0], PRESERVATIONS)
        hint += f"; {near_ones}" if near_ones and not hint else ""
        raise ValueError(f"names {', '.join(map(format_value, unknown))}; known are {known}{hint}")
    negative = sorted(name for name, weight in weights.items() if weight < 0)
    if negative:
        raise ValueError(f"has a negative weight for {', '.join(negative)}; give 0 or more")
    return {name: weights[name] for name in PRESERVATIONS if weights.get(name)}


def check_phrases(texts: tuple[str, ...]) -> tuple[str, ...]:
    for text in check_prompts(texts):
        if "{}" not in text:
            raise ValueError(f"has no {{}} for the trigger in {format_value(text)}")
    return texts


def check_prompts(texts: tuple[str, ...]) -> tuple[str, ...]:
    for text in texts:
        check_text(text)
    return texts

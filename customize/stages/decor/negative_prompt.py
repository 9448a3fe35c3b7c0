"""The texts of a call's arguments, and unwanted phrases added to its negative prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from customize.concepts.tokens.prompt_phrases import find_phrase
from customize.pipeline.stage import CallArguments, CallContext

_NEGATIVE = "negative_prompt"


def argument_texts(call: CallArguments, name: str) -> list[str]:
    """Return the distinct texts of an argument and its variants for further text encoders."""
    values = [value for values in _values_by_argument(call, name).values() for value in values]
    return list(dict.fromkeys(value for value in values if isinstance(value, str)))


def add_to_negative_prompt(
    context: CallContext, call: CallArguments, unwanted: Mapping[str, tuple[str, ...]]
) -> tuple[CallArguments, list[str]]:
    """Append the unwanted phrases of each prompt to its negative prompt.

    The call stays unchanged where the pipeline has no negative prompt, where it is given as
    embeddings, and where the numbers of prompts and negative prompts differ.

    Args:
        context: The pipeline of the call.
        call: The arguments by name; not modified.
        unwanted: prompt -> phrases.

    Returns:
        The arguments of the call, and its negative prompts that contain such phrases.
    """
    prompts = _values_by_argument(call, "prompt").values()
    negatives = {_NEGATIVE: [""]} | _values_by_argument(call, _NEGATIVE)
    count = max(map(len, prompts))
    fits = all(len(values) in (1, count) for values in (*prompts, *negatives.values()))
    has_embeddings = call.get(f"{_NEGATIVE}_embeds") is not None
    if not fits or _NEGATIVE not in context.parameters or has_embeddings:
        return call, []
    changed, extended = dict(call), []
    for argument, values in negatives.items():
        texts = []
        for row, phrases in enumerate(phrases_by_row(call, unwanted)):
            text = values[row % len(values)] or ""
            missing = [phrase for phrase in phrases if not find_phrase(phrase, text)]
            texts.append(", ".join(filter(None, [text, *missing])))
            extended += texts[-1:] if phrases else []
        changed[argument] = texts if isinstance(call.get("prompt"), list) else texts[0]
    return changed, extended


def phrases_by_row(
    call: CallArguments, unwanted: Mapping[str, tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """Return the unwanted phrases of each prompt of a call, in all its variants.

    Args:
        call: The arguments by name, with prompts as text.
        unwanted: prompt -> phrases.
    """
    prompts = _values_by_argument(call, "prompt").values()
    rows = []
    for row in range(max(map(len, prompts))):
        first, *others = [unwanted.get(variant[row % len(variant)], ()) for variant in prompts]
        rows.append(tuple(p for p in first if all(p in other for other in others)))
    return rows


def _values_by_argument(call: CallArguments, name: str) -> dict[str, list[Any]]:
    """Map an argument and its numbered variants, such as ``prompt_2``, to their lists of values."""
    arguments = (name, *(f"{name}_{number}" for number in (2, 3, 4)))
    present = {argument: call.get(argument) for argument in arguments}
    return {
        argument: list(value) if isinstance(value, list | tuple) else [value]
        for argument, value in present.items()
        if value is not None
    }

"""The texts of a call, and naming what is not wanted in its negative prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from customize.concepts.tokens.prompt_phrases import find_phrase as places_of
from customize.pipeline.call_wrapper import CallArguments, CallContext

_NEGATIVE = "negative_prompt"


def argument_texts(call: CallArguments, name: str) -> list[str]:
    """All that a call says by an argument, and by those of its further encoders."""
    found = [text for own in _texts_by_argument(call, name).values() for text in own]
    return list(dict.fromkeys(each for each in found if isinstance(each, str)))


def add_to_negative_prompt(
    context: CallContext, call: CallArguments, unwanted: Mapping[str, tuple[str, ...]]
) -> tuple[CallArguments, list[str]]:
    """The call with what is not wanted in its negative prompts, behind what they say by themselves.

    A call that gives them as embeddings, or in another number than the prompts, stays as it is, and
    so does that of a pipeline that reads none.

    Args:
        unwanted: prompt -> the phrases that are not wanted in it.

    Returns:
        The call, and the negative prompts of it that name such phrases.
    """
    prompts = list(_texts_by_argument(call, "prompt").values())
    negative = {_NEGATIVE: [""]} | _texts_by_argument(call, _NEGATIVE)
    count = max(map(len, prompts))
    fits = all(len(own) in (1, count) for own in (*prompts, *negative.values()))
    if (
        not fits
        or _NEGATIVE not in context.parameters
        or call.get(f"{_NEGATIVE}_embeds") is not None
    ):
        return call, []
    found, named = dict(call), []
    for name, own in negative.items():
        texts = []
        for number in range(count):
            said = [unwanted[each[number % len(each)]] for each in prompts]
            phrases = [phrase for phrase in said[0] if all(phrase in other for other in said)]
            text = own[number % len(own)] or ""
            more = [phrase for phrase in phrases if not places_of(phrase, text)]
            texts.append(", ".join(filter(None, [text, *more])))
            named += texts[-1:] if phrases else []
        found[name] = texts if isinstance(call.get("prompt"), list) else texts[0]
    return found, named


def _texts_by_argument(call: CallArguments, name: str) -> dict[str, list[Any]]:
    """Argument -> its texts, of one and of those of further encoders, where they are given."""
    found = {}
    for argument in (name, *(f"{name}_{k}" for k in (2, 3, 4))):
        value = call.get(argument)
        if value is not None:
            found[argument] = list(value) if isinstance(value, list | tuple) else [value]
    return found

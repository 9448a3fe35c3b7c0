"""Prompt routing: the concepts that a call's prompts name are taken from the library.

It reads every argument that is a prompt, by its name, and attaches what they name together: a batch
whose prompts name different concepts is drawn with all of them. To split it would need to know how
each argument of each pipeline goes with the prompts (noise, masks, reference pictures, callbacks),
and one generator would draw another noise for each part. Fusion keeps concepts to their own
prompts; who wants each picture as it is alone calls once for each prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from customize.concepts.index import Entry
from customize.concepts.library import TRIGGER
from customize.concepts.tokens import around, known
from customize.core.precision import full_precision
from customize.errors import ConfigError
from customize.families import Family
from customize.hosts.calling import Call, Stage
from customize.hosts.sources import family_in
from customize.hosts.state import Holder, find, tokenizers_of

_PROMPT = re.compile(r"(negative_)?prompt(_\d+)?")
_TRIGGER = re.compile(TRIGGER, re.IGNORECASE)


@contextmanager
def _routed(pipe: Any, call: Call) -> Iterator[Call]:
    """Attach what the prompts name, and leave it there: the next such call then does nothing."""
    from customize.hosts.load import route_to  # which has the table of stages, and so this

    family = family_in(pipe)
    holder = find(family)
    prompts = {name: value for name, value in call.items() if _PROMPT.fullmatch(name)}
    texts = [text for value in prompts.values() for text in _texts(value)]
    if holder.shelf is None or not texts:
        yield call
        return
    entries = _named(family, holder, texts)
    with full_precision(tf32=True):
        route_to(pipe, holder, [*{entry.source: entry for entry in entries.values()}.values()])
    words = {
        trigger: entry.words or entry.name.replace("-", " ").replace("_", " ")
        for trigger, entry in entries.items()
        if not entry.own_tokens and trigger == entry.trigger
    }
    yield call | {name: _worded(value, words) for name, value in prompts.items()}


ROUTING = Stage(arguments=(), run=_routed)


def _named(family: Family, holder: Holder, texts: Iterable[str]) -> dict[str, Entry]:
    """Token, in lower case -> the concept of the library that it calls.

    Raises:
        ConfigError: something looks like a trigger, and nothing knows it.
        ConceptError: see :meth:`customize.hosts.shelf.Shelf.entry`.
    """
    shelf = holder.shelf
    assert shelf is not None
    shelf.library.follow()
    tokenizers = tokenizers_of(family).values()
    ours = {name for names in holder.tokens.values() for name in names}
    by_name = [each.concept.info for each in holder.attached.values() if not each.routed]
    loaded = {trigger.lower() for info in by_name for trigger in info.triggers}
    said = " ".join(info.words for info in by_name).lower()
    found: dict[str, Entry] = {}
    tokens = [token for text in texts for token in _tokens(text, tokenizers, ours)]
    for token in dict.fromkeys(tokens):
        trigger = token.lower()
        if trigger in loaded or trigger in found:
            continue
        entry = shelf.entry(trigger)
        if entry is not None:
            found[trigger] = entry
            continue
        others = any(token not in ours and known(each, [token]) for each in tokenizers)
        if not others and trigger not in said:
            near = ", ".join(shelf.library.near(trigger, shelf.fits))
            count = len(shelf.library.entries)
            raise ConfigError(
                f"the prompt names {token}, and none of the library's {count} concepts has that "
                "trigger" + (f"; it has {near}" if near else ""),
                where=shelf.library.folder,
                fix="write one that is there, add the concept to the library, or leave out the "
                "brackets where a plain word is meant",
            )
    return found


def _tokens(text: str, tokenizers: Iterable[Any], ours: set[str]) -> list[str]:
    """All that looks like a trigger in a text, and is no part of a longer token of others."""
    found = _TRIGGER.findall(text)
    if not found:
        return []
    longer = {name for each in tokenizers for name in each.get_added_vocab()} - ours
    for name in around(found, longer):
        text = text.replace(name, " ")
    return _TRIGGER.findall(text)


def _texts(value: Any) -> list[str]:
    """The texts of a prompt: one, or those of a batch or of a video's frames."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [text for each in value for text in _texts(each)]


def _worded(value: Any, words: Mapping[str, str]) -> Any:
    """A prompt with a LoRA's own words in the place of its trigger, in the form that it had."""
    if not words:
        return value
    if isinstance(value, str):
        pattern = "|".join(map(re.escape, words))
        return re.sub(pattern, lambda m: words[m.group().lower()], value, flags=re.IGNORECASE)
    if isinstance(value, Mapping):
        return {key: _worded(each, words) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_worded(each, words) for each in value)
    return value

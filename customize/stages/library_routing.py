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

from customize.concepts.library.index import LibraryEntry
from customize.core.precision import full_precision
from customize.errors import ConfigError
from customize.families import Family
from customize.pipeline.call_lock import is_nested
from customize.pipeline.call_wrapper import CallArguments, CallContext, Stage
from customize.pipeline.state import AttachedState
from customize.stages.check_prompts import Vocabulary, flatten_texts, prompt_arguments


@contextmanager
def _routed(context: CallContext, call: CallArguments) -> Iterator[CallArguments]:
    """Attach what the prompts name, and leave it there: the next such call then does nothing.

    A call inside another one of the same models, as a callback makes it, puts back what was there.
    """
    from customize.pipeline.attach import route_to  # which has the table of stages, and so this

    family, state = context.family, context.state
    prompts = prompt_arguments(call)
    texts = [text for value in prompts.values() for text in flatten_texts(value)]
    if not texts:
        yield call
        return
    entries = _named(family, state, texts)
    cache = state.library_cache
    assert cache is not None
    before = (
        [cache.library.entries[source] for source in cache.active_concepts] if is_nested() else None
    )
    with full_precision(tf32=True):
        route_to(family, state, [*{entry.source: entry for entry in entries.values()}.values()])
    words = {
        trigger: entry.trigger_words or entry.name.replace("-", " ").replace("_", " ")
        for trigger, entry in entries.items()
        if not entry.has_own_tokens and trigger == entry.trigger
    }
    try:
        yield call | {name: _worded(value, words) for name, value in prompts.items()}
    finally:
        if before is not None and state.library_cache is cache:
            with full_precision(tf32=True):
                route_to(family, state, before)


ROUTING = Stage(arguments=(), run=_routed, acts=lambda state: state.library_cache is not None)


def _named(family: Family, state: AttachedState, texts: Iterable[str]) -> dict[str, LibraryEntry]:
    """Token, in lower case -> the concept of the library that it calls.

    Raises:
        ConfigError: something looks like a trigger, and nothing knows it.
        ConceptError: see :meth:`customize.pipeline.library_cache.LibraryCache.find_entry`.
    """
    cache = state.library_cache
    assert cache is not None
    cache.library.refresh_if_changed()
    by_name = [name for name, each in state.attached.items() if not each.routed]
    vocabulary = Vocabulary(family, state, by_name)
    loaded = {trigger.lower() for trigger in vocabulary.triggers}
    found: dict[str, LibraryEntry] = {}
    for token in vocabulary.find_triggers(texts):
        trigger = token.lower()
        if trigger in loaded or trigger in found:
            continue
        entry = cache.find_entry(trigger)
        if entry is not None:
            found[trigger] = entry
            continue
        if not vocabulary.is_known_elsewhere(token):
            near = ", ".join(cache.library.similar_triggers(trigger, cache.is_compatible))
            count = len(cache.library.entries)
            raise ConfigError(
                f"the prompt names {token}, and none of the library's {count} concepts has that "
                "trigger" + (f"; it has {near}" if near else ""),
                where=cache.library.folder,
                fix="write one that is there, add the concept to the library, or leave out the "
                "brackets where a plain word is meant",
            )
    return found


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

"""The prompts of a call: what in them looks like a trigger and is none, and triggers that the text
encoders do not read because the prompt is too long."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from customize.concepts.library.library import TRIGGER_PATTERN
from customize.concepts.tokens.prompt_phrases import find_phrase
from customize.concepts.tokens.token_rows import known_tokens, tokens_containing
from customize.families import Family
from customize.near_names import did_you_mean
from customize.pipeline.call_wrapper import CallArguments, CallContext, Stage
from customize.pipeline.state import AttachedState, get_tokenizers
from customize.pipeline.user_warnings import warn_user

_PROMPT = re.compile(r"(negative_)?prompt(_\d+)?")
_TRIGGER = re.compile(TRIGGER_PATTERN, re.IGNORECASE)


def prompt_arguments(call: CallArguments) -> dict[str, Any]:
    """Argument -> its value, for every one that is a prompt, the negative ones too."""
    return {name: value for name, value in call.items() if _PROMPT.fullmatch(name)}


def flatten_texts(prompt: Any) -> list[str]:
    """The texts of a prompt: one, or those of a batch or of a video's frames."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, Mapping):
        prompt = prompt.values()
    elif not isinstance(prompt, list | tuple):
        return []
    return [text for each in prompt for text in flatten_texts(each)]


class Vocabulary:
    """What the tokenizers of a model know, and what of it is an attached concept's.

    Args:
        names: of the attached concepts that count; None: all.
    """

    def __init__(
        self, family: Family, state: AttachedState, names: Collection[str] | None = None
    ) -> None:
        infos = [
            each.concept.info
            for name, each in state.attached.items()
            if names is None or name in names
        ]
        self.triggers = [trigger for info in infos for trigger in info.triggers]
        self._words = " ".join(info.trigger_words for info in infos).lower()
        self._tokenizers = list(get_tokenizers(family).values())
        self._entries = {name for entries in state.token_names.values() for name in entries}

    def triggers_in(self, texts: Iterable[str]) -> list[str]:
        """What looks like a trigger, each once; no part of a longer token of others."""
        found = [trigger for text in texts for trigger in self._triggers_in(text)]
        return list(dict.fromkeys(found))

    def _triggers_in(self, text: str) -> list[str]:
        found = _TRIGGER.findall(text)
        if not found:
            return []
        longer = {name for each in self._tokenizers for name in each.get_added_vocab()}
        for name in tokens_containing(found, longer - self._entries):
            text = text.replace(name, " ")
        return _TRIGGER.findall(text)

    def has_elsewhere(self, token: str) -> bool:
        """Whether it is a token of the tokenizers' or of the user's own, such as one of a textual
        inversion, or is in the words that call a LoRA."""
        others = token not in self._entries
        others = others and any(known_tokens(each, [token]) for each in self._tokenizers)
        return others or token.lower() in self._words

    def unknown_in(self, texts: Iterable[str]) -> list[str]:
        """What looks like a trigger, and neither a concept nor a tokenizer knows it."""
        known_here = {trigger.lower() for trigger in self.triggers}
        return [
            token
            for token in self.triggers_in(texts)
            if token.lower() not in known_here and not self.has_elsewhere(token)
        ]


@contextmanager
def _run(context: CallContext, call: CallArguments) -> Iterator[CallArguments]:
    """Warn about triggers, except where a step attaches the call's concepts and warns itself."""
    if call.get("concepts") is None:
        warn_about_triggers(context, call)
    yield call


def warn_about_triggers(context: CallContext, call: CallArguments) -> None:
    """Warn of what looks like a trigger and is none, and of triggers that are cut off.

    Args:
        call: the arguments by name, of which the prompts count.
    """
    vocabulary = Vocabulary(context.family, context.state)
    texts = [text for prompt in prompt_arguments(call).values() for text in flatten_texts(prompt)]
    for token in vocabulary.unknown_in(texts):
        hint = did_you_mean(token, vocabulary.triggers)
        warn_user(
            f"the prompt names {token}, and no attached concept has that trigger; "
            + (hint or f"those that are attached are {', '.join(vocabulary.triggers) or 'none'}")
        )
    for message in truncation_warnings(context, call):
        warn_user(message)


#: Checks the prompts of customized pipelines.
PROMPTS = Stage((), _run, acts=lambda s: bool(s.attached or s.library_cache), exclusive=False)


def truncation_warnings(context: CallContext, call: CallArguments) -> list[str]:
    """What to say of prompts in which an attached concept is named behind what is read."""
    infos = [each.concept.info for each in context.state.attached.values()]
    names = list(
        dict.fromkeys(name for info in infos for name in (info.trigger_words, *info.triggers))
    )
    if "max_embeddings_multiples" in context.parameters:
        return []  # a community pipeline, which reads long prompts in parts
    found = []
    for key in context.family.all_text_encoders:
        tokenizer = context.family.tokenizer_for(key)
        window = _token_limit(context, call, key, tokenizer)
        if window is None:
            continue
        for start in ("prompt", "negative_prompt"):
            prompt = call.get(start + key.removeprefix("text_encoder"))
            for text in flatten_texts(call.get(start) if prompt is None else prompt):
                cut = [
                    name for name in names if name and is_truncated(name, text, tokenizer, window)
                ]
                if cut:
                    count = len(tokenizer(text, verbose=False).input_ids)
                    shown = text if len(text) <= 60 else f"{text[:60]}..."
                    found.append(
                        f"the {start.replace('_', ' ')} {shown!r} has {count} tokens, of which "
                        f"the {key} reads {window}: {', '.join(cut)} is cut off; shorten it, or "
                        "write that nearer to its beginning"
                    )
    return list(dict.fromkeys(found))


def is_truncated(name: str, text: str, tokenizer: Any, window: int) -> bool:
    """Whether the first mention of a name in a text is behind the tokens that are read."""
    places = find_phrase(name, text)
    if not places or len(text) < window // 2:  # no token is shorter than half a letter
        return False
    begun = tokenizer(text[: places[0][1]], add_special_tokens=False, verbose=False).input_ids
    return len(begun) > window - tokenizer.num_special_tokens_to_add()


def _token_limit(context: CallContext, call: CallArguments, key: str, tokenizer: Any) -> int | None:
    """How many tokens of a prompt an encoder reads; None where that is not known."""
    if not hasattr(tokenizer, "num_special_tokens_to_add"):
        return None
    if key in context.family.clip_encoders:
        return int(tokenizer.model_max_length)
    given = call.get("max_sequence_length", context.parameters.get("max_sequence_length"))
    return given if isinstance(given, int) else None

"""The stage that warns about prompts: unknown triggers, and triggers beyond the token limit."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from customize.concepts.library.library import TRIGGER_PATTERN
from customize.concepts.tokens.token_rows import known_tokens, tokens_containing
from customize.families import Family
from customize.near_names import did_you_mean
from customize.pipeline.stage import CallArguments, CallContext, Stage
from customize.pipeline.state import AttachedState, get_tokenizers
from customize.stages.token_limits import own_argument, token_limits
from customize.user_warnings import warn_user

_PROMPT_ARGUMENT = re.compile(r"(negative_)?prompt(_\d+)?")
_TRIGGER = re.compile(TRIGGER_PATTERN, re.IGNORECASE)


def prompt_arguments(call: CallArguments) -> dict[str, Any]:
    """Return the arguments of a call that are prompts, negative prompts included."""
    return {name: value for name, value in call.items() if _PROMPT_ARGUMENT.fullmatch(name)}


def flatten_texts(prompt: Any) -> list[str]:
    """Return the texts of a prompt: a text, a list of them, or a dict by frames of a video."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, Mapping):
        prompt = prompt.values()
    elif not isinstance(prompt, list | tuple):
        return []
    return [text for item in prompt for text in flatten_texts(item)]


class Vocabulary:
    """The tokens in the vocabularies of a model, and those that belong to attached concepts.

    Args:
        family: The models of the pipeline.
        state: The concepts attached to them.
        names: Names of the attached concepts to consider; None for all.
    """

    def __init__(
        self, family: Family, state: AttachedState, names: Collection[str] | None = None
    ) -> None:
        infos = [
            attached.concept.info
            for name, attached in state.attached.items()
            if names is None or name in names
        ]
        self.triggers = [trigger for info in infos for trigger in info.triggers]
        self._words = " ".join(info.trigger_words for info in infos).lower()
        self._tokenizers = list(get_tokenizers(family).values())
        self._concept_tokens = {name for tokens in state.token_names.values() for name in tokens}

    def find_triggers(self, texts: Iterable[str]) -> list[str]:
        """Return substrings in the form of triggers, except parts of longer tokens of the user."""
        triggers: dict[str, None] = {}
        for text in texts:
            matches = _TRIGGER.findall(text)
            if matches:
                added = {name for t in self._tokenizers for name in t.get_added_vocab()}
                for name in tokens_containing(matches, added - self._concept_tokens):
                    text = text.replace(name, " ")
                triggers |= dict.fromkeys(_TRIGGER.findall(text))
        return list(triggers)

    def is_known_elsewhere(self, token: str) -> bool:
        """Whether a token belongs to no concept, but to the tokenizers or the user.

        Examples are tokens of a textual inversion, and parts of a LoRA's trigger words.
        """
        if token.lower() in self._words:
            return True
        is_concepts = token in self._concept_tokens
        return not is_concepts and any(known_tokens(t, [token]) for t in self._tokenizers)


@contextmanager
def _run(context: CallContext, call: CallArguments) -> Iterator[CallArguments]:
    # A modular step that attaches concepts warns after it has attached them.
    if call.get("concepts") is None:
        warn_about_triggers(context, call)
    yield call


#: Checks the prompts of customized pipelines.
STAGE = Stage("prompts", _run, acts=lambda state, arguments: state.changes_models, exclusive=False)


def warn_about_triggers(context: CallContext, call: CallArguments) -> None:
    """Warn about unknown triggers in prompts, and triggers that the text encoders do not read."""
    vocabulary = Vocabulary(context.family, context.state)
    texts = [text for prompt in prompt_arguments(call).values() for text in flatten_texts(prompt)]
    attached = {trigger.lower() for trigger in vocabulary.triggers}
    for token in vocabulary.find_triggers(texts):
        if token.lower() not in attached and not vocabulary.is_known_elsewhere(token):
            triggers = ", ".join(vocabulary.triggers) or "none"
            hint = did_you_mean(token, vocabulary.triggers)
            warn_user(
                f"the prompt contains {token}, and no attached concept has that trigger; "
                + (hint or f"the attached triggers are {triggers}")
            )
    for message in _truncation_warnings(context, call):
        warn_user(message)


def _truncation_warnings(context: CallContext, call: CallArguments) -> list[str]:
    infos = [attached.concept.info for attached in context.state.attached.values()]
    names = list(
        dict.fromkeys(name for info in infos for name in (info.trigger_words, *info.triggers))
    )
    messages = []
    for limit in token_limits(context, call):
        for argument in ("prompt", "negative_prompt"):
            prompt = call.get(own_argument(limit.encoder, argument))
            for text in flatten_texts(call.get(argument) if prompt is None else prompt):
                cut = [name for name in names if name and limit.cuts_off(name, text)]
                if cut:
                    shown = text if len(text) <= 60 else f"{text[:60]}..."
                    messages.append(
                        f"the {argument.replace('_', ' ')} {shown!r} has {limit.count(text)} "
                        f"tokens, of which the {limit.encoder} reads {limit.tokens}: "
                        f"{', '.join(cut)} is cut off; shorten it, or write that nearer to its "
                        "beginning"
                    )
    return list(dict.fromkeys(messages))

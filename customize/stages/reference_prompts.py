"""The prompts of a call, and the words of them that have references."""

from __future__ import annotations

from collections.abc import Sequence

from customize.concepts.tokens.prompt_phrases import find_phrase
from customize.errors import ConfigError
from customize.pipeline.stage import CallArguments, CallContext
from customize.references.group import ReferenceGroup
from customize.references.images import ARGUMENT, count_prompts
from customize.references.request import ReferenceRequest
from customize.text import quote
from customize.user_warnings import warn_user


def prompt_texts(call: CallArguments) -> list[str]:
    """Return the prompts of a call; empty texts where they are given as embeddings."""
    prompt = call.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if isinstance(prompts, list | tuple) and all(isinstance(text, str) for text in prompts):
        return list(prompts)
    return [""] * count_prompts(call)


def check_words(request: ReferenceRequest, prompts: Sequence[str]) -> None:
    """Refuse groups for words of prompts that are given as embeddings.

    Raises:
        ConfigError: There is such a group.
    """
    for sources, prompt in zip(request.sources, prompts, strict=True):
        for key in sources:
            if key is not None and not prompt:
                raise ConfigError(
                    "references for words of the prompt need the prompt as text",
                    where="prompt",
                    fix="give prompt= a text or a list of texts",
                )


def by_concept_words(
    request: ReferenceRequest, prompts: Sequence[str], context: CallContext
) -> ReferenceRequest:
    """Replace names of concepts by the words that ``regions=`` replaces them by.

    Raises:
        ConfigError: A prompt does not contain the words of a group.
    """
    words = {name: a.concept.info.trigger_words for name, a in context.state.attached.items()}

    def resolve(key: str | None, prompt: str) -> str | None:
        trigger = words.get(key or "", "")
        if key is None or (trigger and find_phrase(trigger, prompt)):
            return trigger or key
        if not find_phrase(key, prompt):
            raise ConfigError(
                f"the prompt does not contain {quote(key)}",
                where=f"{ARGUMENT}[{quote(key)}]",
                fix="give words of the prompt",
            )
        return key

    renamed = [
        tuple({resolve(key, prompt): value for key, value in each.items()} for each in pair)
        for *pair, prompt in zip(request.sources, request.scales, prompts, strict=True)
    ]
    sources, scales = zip(*renamed, strict=True)
    return ReferenceRequest(sources, scales, request.layer_scale)


def warn_about_prompts(request: ReferenceRequest, prompts: Sequence[str]) -> None:
    """Warn of groups that were encoded with another prompt than the one that they are used with."""
    pairs = dict.fromkeys(
        (source.prompt, prompt)
        for sources, prompt in zip(request.sources, prompts, strict=True)
        for source in sources.values()
        if isinstance(source, ReferenceGroup) and source.prompt != prompt
    )
    if pairs:
        encoded, used = next(iter(pairs))
        more = f"; and {len(pairs) - 1} more" if len(pairs) > 1 else ""
        warn_user(
            f"the group of references was encoded with the prompt {quote(encoded)}, and is used "
            f"with {quote(used)}{more}"
        )

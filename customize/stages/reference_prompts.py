"""The prompts of a call, and the words of them that have references."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from customize.concepts.tokens.prompt_phrases import find_phrase
from customize.errors import ConfigError
from customize.pipeline.stage import CallArguments, CallContext
from customize.references.group import ReferenceGroup
from customize.references.images import ARGUMENT, count_prompts
from customize.references.request import ReferenceRequest
from customize.text import quote
from customize.user_warnings import warn_user


def prompt_texts(call: CallArguments) -> list[str]:
    """Return the prompts of a call; empty texts where they are given as embeddings.

    Raises:
        ConfigError: The prompt is an empty list.
    """
    prompt = call.get("prompt")
    if isinstance(prompt, list | tuple) and not prompt:
        raise ConfigError("the list of prompts is empty", where="prompt", fix="give at least one")
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


def by_region_words(
    request: ReferenceRequest, prompts: Sequence[str], context: CallContext
) -> ReferenceRequest:
    """Replace the words of groups by those of the regions that read them.

    Names of concepts stand for their triggers, as in ``regions=``; case and white space are
    ignored.

    Raises:
        ConfigError: A prompt does not contain the words of a group, no region has them, or two
            groups have the same.
    """
    triggers = {name: a.concept.info.trigger_words for name, a in context.state.attached.items()}
    regions = _words_of_regions(context.requested.get("regions"), prompts, triggers)
    sources, scales = [], []
    for number, prompt in enumerate(prompts):
        new = _rename(request.sources[number], prompt, triggers, regions[number])
        sources.append({new[key]: value for key, value in request.sources[number].items()})
        scales.append({new[key]: value for key, value in request.scales[number].items()})
    return ReferenceRequest(tuple(sources), tuple(scales), request.layer_scale)


def _words_of_regions(
    regions: Any, prompts: Sequence[str], triggers: Mapping[str, str]
) -> list[dict[str, str] | None]:
    """Return for each prompt: folded words of a region -> its words; None where it has none."""
    dicts = [regions] * len(prompts) if isinstance(regions, Mapping) else regions
    if not isinstance(dicts, list | tuple) or len(dicts) != len(prompts):
        return [None] * len(prompts)  # regions= refuses what has another form
    found: list[dict[str, str] | None] = []
    for prompt, keys in zip(prompts, dicts, strict=True):
        names = [key for key in keys if isinstance(key, str)] if isinstance(keys, Mapping) else []
        words = [_resolve(key, prompt, triggers) for key in names]
        found.append({_fold(each): each for each in words})
    return found


def _resolve(key: str, prompt: str, triggers: Mapping[str, str]) -> str:
    """Return the trigger words of a concept's name that is not in the prompt itself."""
    trigger = triggers.get(key, "")
    return trigger if trigger and find_phrase(trigger, prompt) else key


def _fold(words: str) -> str:
    return " ".join(words.lower().split())


def _rename(
    keys: Iterable[str | None],
    prompt: str,
    triggers: Mapping[str, str],
    regions: Mapping[str, str] | None,
) -> dict[str | None, str | None]:
    """Return the words of the region that reads each group of a prompt."""
    renamed: dict[str | None, str | None] = {}
    for key in keys:
        if key is None:
            renamed[None] = None
            continue
        where = f"{ARGUMENT}[{quote(key)}]"
        words = _resolve(key, prompt, triggers)
        if not find_phrase(words, prompt):
            raise ConfigError(
                f"the prompt does not contain {quote(key)}",
                where=where,
                fix="give words of the prompt",
            )
        if regions is None:
            raise ConfigError(
                "references for words of the prompt need their regions",
                where=where,
                fix="give regions= with the same words, or one list of images",
            )
        if _fold(words) not in regions:
            raise ConfigError(
                f"{quote(key)} has references and no region",
                where=where,
                fix="write the same words in reference_images= and regions=, which has "
                + (", ".join(map(quote, regions.values())) or "none"),
            )
        region = regions[_fold(words)]
        if region in renamed.values():
            raise ConfigError(
                f"two groups of references are for {quote(region)}",
                where=where,
                fix="put all images into one group",
            )
        renamed[key] = region
    return renamed


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

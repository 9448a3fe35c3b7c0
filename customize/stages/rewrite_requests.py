"""The prompts of a call as requests of rewritings: what each must keep, and its seed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from customize.concepts.tokens.token_limit import TokenLimit
from customize.errors import ConfigError, PipelineError
from customize.pipeline.stage import CallArguments, CallContext
from customize.rewriting.prompt_characters import find_control_character
from customize.rewriting.required_terms import RequiredTerms, required_terms
from customize.stages.token_limits import own_argument, token_limits
from customize.text import quote

if TYPE_CHECKING:
    from customize.concepts.formats.lora_file import LoraFile
    from customize.concepts.types import Adaptation

#: The longest prompt that is rewritten, in characters.
MAX_PROMPT_LENGTH = 4000


def call_requests(
    context: CallContext, call: CallArguments, prompts: Sequence[str], keep: Sequence[str]
) -> list[RequiredTerms]:
    """Return what each prompt's rewriting must keep: also what other stages find in it.

    Args:
        context: The pipeline that is called.
        call: The arguments of the call.
        prompts: The prompts.
        keep: Phrases to keep.
    """
    named = [
        key
        for argument in ("regions", "reference_images")
        for value in _as_list(context.requested.get(argument))
        if isinstance(value, Mapping)
        for key in value
        if isinstance(key, str)
    ]
    avoid = context.requested.get("avoid") or ()
    avoid = avoid.split(",") if isinstance(avoid, str) else avoid
    triggers = attached_class_words(context)
    avoided = [phrase for phrase in avoid if isinstance(phrase, str) and phrase != "auto"]
    kept, limits = (*keep, *named), _limits(context, call)
    return [required_terms(prompt, triggers, kept, avoided, limits) for prompt in prompts]


def attached_class_words(context: CallContext) -> dict[str, str]:
    """Return the trigger words of the attached concepts -> their class word."""
    return find_class_words(entry.concept for entry in context.state.attached.values())


def find_class_words(concepts: Iterable[Adaptation | LoraFile]) -> dict[str, str]:
    """Return the trigger words of concepts -> their class word; empty where that is unknown."""
    words: dict[str, str] = {}
    for concept in concepts:
        info = concept.info
        words |= {word: info.class_word for word in (info.trigger_words, *info.triggers) if word}
        words |= {subject.trigger: subject.class_word for subject in concept.subjects}
    return words


def _limits(context: CallContext, call: CallArguments) -> list[TokenLimit]:
    """Return the limits of the encoders that read the prompt; none in unknown families."""
    try:
        limits = token_limits(context, call)
    except PipelineError:
        return []
    return [
        limit
        for limit in limits
        if own_argument(limit.encoder) == "prompt" or call.get(own_argument(limit.encoder)) is None
    ]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def call_prompts(call: CallArguments) -> list[str]:
    """Return the prompts of a call.

    Raises:
        ConfigError: They are no texts, or one is longer than :data:`MAX_PROMPT_LENGTH`.
    """
    prompt = call.get("prompt")
    if prompt is None:
        raise ConfigError(
            "rewrite=True needs the prompt as text",
            where="prompt",
            fix="give prompt= a text or a list of texts, and no prompt_embeds",
        )
    return check_prompts([prompt] if isinstance(prompt, str) else prompt)


def check_prompts(prompts: Any) -> list[str]:
    """Return prompts as a list of texts.

    Raises:
        ConfigError: They are no texts, or one has control characters or is longer than
            :data:`MAX_PROMPT_LENGTH`.
    """
    is_list = isinstance(prompts, list | tuple) and len(prompts) > 0
    if not is_list or not all(isinstance(text, str) for text in prompts):
        raise ConfigError(
            f"the prompt {quote(prompts)} is neither a text nor a list of texts",
            where="prompt",
            fix="give a text for each picture",
        )
    for text in prompts:
        if len(text) > MAX_PROMPT_LENGTH:
            raise ConfigError(
                f"a prompt of {len(text):,} characters is too long to be rewritten",
                where="prompt",
                fix=f"give at most {MAX_PROMPT_LENGTH:,} characters, or leave rewrite= out",
            )
        char = find_control_character(text)
        if char is not None:
            raise ConfigError(
                f"the prompt {quote(text, 80)} has the control character {quote(char)}",
                where="prompt",
                fix="remove it",
            )
    return list(prompts)


def call_seeds(call: CallArguments, count: int) -> list[int]:
    """Return a seed for each prompt: what the call's generator would give, without advancing it.

    Args:
        call: Arguments of the call. Without ``generator``, torch's global state is read.
        count: Number of prompts.
    """
    generator = call.get("generator")
    if isinstance(generator, list | tuple) and generator:
        return [_draw(generator[k * len(generator) // count], 1)[0] for k in range(count)]
    return _draw(generator, count)


def copy_generators(generator: Any) -> Any:
    """Return a copy of a generator, or of each in a list, in its present state."""
    if isinstance(generator, list | tuple):
        return [copy_generators(each) for each in generator]
    if not isinstance(generator, torch.Generator):
        return copy.copy(generator)
    made = torch.Generator(device=generator.device)
    made.set_state(generator.get_state())
    return made


def _draw(generator: Any, count: int) -> list[int]:
    if isinstance(generator, torch.Generator):
        copied = copy_generators(generator)
        seeds = torch.randint(2**31, (count,), generator=copied, device=copied.device)
        return list(seeds.cpu().tolist())
    with torch.random.fork_rng(devices=[]):
        return list(torch.randint(2**31, (count,)).tolist())

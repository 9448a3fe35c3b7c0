"""The stage that projects unwanted content out of prompts: ``avoid=`` (DECOR, arXiv 2412.09169).

The formula, ``X' = X - strength * X V V^T``, is the paper's. The paper applies it to the embeddings
of the text encoders (:mod:`customize.stages.decor.text_encoder`). Where concepts are attached, it
is applied to what their updates add to keys and values instead
(:mod:`customize.stages.decor.kv_updates`), which costs less identity; and the unwanted phrases are
added to the negative prompts (:mod:`customize.stages.decor.negative_prompt`). What reference images
share is removed by their stage (:mod:`customize.stages.reference_avoid`), which gets the phrases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from customize.concepts.tokens.prompt_phrases import find_phrase, unmentioned_part
from customize.core.projection import check_strength
from customize.core.scalars import as_float
from customize.errors import ConfigError, PipelineError
from customize.families.pipeline_components import is_compiled
from customize.near_names import did_you_mean
from customize.pipeline.stage import CallArguments, CallContext, Stage
from customize.pipeline.state import AttachedState, StageSetting
from customize.pipeline.validation import check_text_encoders_loaded
from customize.stages.decor.kv_updates import UpdateCleaner, adapted_kv_layers
from customize.stages.decor.negative_prompt import (
    add_to_negative_prompt,
    argument_texts,
    phrases_by_row,
)
from customize.stages.decor.reference_values import AvoidedContent
from customize.stages.decor.text_encoder import EncoderCleaning, clean_text_encoders
from customize.text import quote
from customize.user_warnings import warn_user

AUTO = "auto"
Target = Literal["prompt", "concepts", "both"]
Negative = Literal["extend", "keep", "clean"]

#: The largest number of words and phrases that one call may avoid.
MAX_PHRASES = 256
# The strength for updates of keys and values where it is "auto". No word of the prompt is touched
# there, so it may exceed 1: of 12 concepts, 22 % of the pictures leak at an identity of 67 %;
# at 1.0 it is 23 % / 68 %, at 2.0 it is 17 % / 66 %, but styles fall from 92 % to 65 %
# (scripts/bench/decor.py, tasks "personalization" and "style").
_AUTO_UPDATE_STRENGTH = 1.25


@dataclass(frozen=True)
class Decor(StageSetting):
    """Settings of ``avoid=`` for all calls of a pipeline: ``pipe.load_custom(Decor(...))``.

    Attributes:
        avoid: Words or phrases to avoid, separated by commas or as a list. "auto": the words that
            all captions of a concept's training images share. None: nothing, unless a call gives
            ``avoid=``. Words that a prompt itself contains are not avoided in that prompt: of "red
            background", "red" is avoided in "a dog on a blue background".
        strength: From 0 (no change) over 1 (removed) to 2 (reversed). "auto": 1.25 for updates of
            concepts and for reference images; for the prompt's embeddings the largest strength up
            to 1 at which every word of the prompt keeps 90 % of its embedding's length.
        target: The object of cleaning. "prompt": the embeddings of the prompt's words, as in the
            paper. "concepts": the updates of keys and values of cross-attention by attached
            concepts, on families ``sd`` and ``sdxl``. "both". None: "concepts" where such concepts
            are attached and not compiled or fused, otherwise "prompt". With every value but
            "prompt" the reference images of a call are cleaned too, on the same families.
        negative: How negative prompts are treated. "extend": unwanted phrases are added to them
            where concepts are the target, and concepts add nothing to those that name no concept;
            otherwise as "keep". "keep": they are left unchanged. "clean": as prompts.
        keys: The strength for keys as a fraction of that for values, from 0 to 1.

    Raises:
        ConfigError: A value is out of its range.
    """

    avoid: str | Sequence[str] | None = None
    strength: float | Literal["auto"] = "auto"
    target: Target | None = None
    negative: Negative = "extend"
    keys: float = 0.25

    def __post_init__(self) -> None:
        if self.avoid is not None:
            parse_phrases(self.avoid)
        if not isinstance(self.strength, str) or self.strength != AUTO:
            strength = as_float(self.strength)
            if math.isnan(strength):
                raise ConfigError(
                    f"invalid strength {quote(self.strength)}",
                    where="strength",
                    fix='give a number from 0 to 2, or "auto"',
                )
            check_strength(strength)
        for name, value, choices in (
            ("target", self.target, (None, *get_args(Target))),
            ("negative", self.negative, get_args(Negative)),
        ):
            if not isinstance(value, str | None) or value not in choices:
                raise ConfigError(
                    f"{quote(value)} is none of {', '.join(map(str, choices))}",
                    where=name,
                    fix=did_you_mean(value, [str(choice) for choice in choices]),
                )
        if not 0.0 <= as_float(self.keys) <= 1.0:
            raise ConfigError(
                f"invalid strength for keys: {quote(self.keys)}",
                where="keys",
                fix="give a fraction of the strength for values, from 0 to 1",
            )

    def __repr__(self) -> str:
        values = {field: getattr(self, field.name) for field in fields(self)}
        changed = (f"{f.name}={value!r}" for f, value in values.items() if value != f.default)
        return f"Decor({', '.join(changed)})"

    def report(self, state: AttachedState) -> str:
        """Return the settings as ``pipe.custom`` prints them."""
        return f"prompts: {self}"

    def __str__(self) -> str:
        phrases = "(per call)" if self.avoid is None else ", ".join(parse_phrases(self.avoid))
        return f"avoid {phrases} (strength {self.strength})"


_DEFAULTS = Decor()


def parse_phrases(avoid: str | Sequence[str]) -> tuple[str, ...]:
    """Split the value of ``avoid=`` into distinct phrases; "auto" gives ``("auto",)``.

    Raises:
        ConfigError: The value is not text, contains no phrase, or more than :data:`MAX_PHRASES`.
    """
    parts = avoid.split(",") if isinstance(avoid, str) else avoid
    # Lone surrogates cannot be tokenized.
    if not isinstance(parts, Sequence) or not all(
        isinstance(part, str) and not any("\ud800" <= c <= "\udfff" for c in part) for part in parts
    ):
        raise ConfigError(
            f"avoid={quote(avoid)} is not text",
            where="avoid",
            fix='give words, such as avoid="beach, fence", or a list of them',
        )
    phrases = tuple(dict.fromkeys(" ".join(part.split()) for part in parts if part.strip()))
    if not phrases:
        raise ConfigError(
            "avoid= contains no words",
            where="avoid",
            fix='give words, such as avoid="beach, fence", or leave the argument out',
        )
    if len(phrases) > MAX_PHRASES:
        raise ConfigError(
            f"{len(phrases):,} phrases to avoid exceed the limit of {MAX_PHRASES}",
            where="avoid",
            fix="give fewer phrases; each costs time and memory in every call",
        )
    return phrases


@contextmanager
def _run(context: CallContext, call: CallArguments, avoid: Any = None) -> Iterator[CallArguments]:
    family, state = context.family, context.state
    settings = state.get_setting(Decor) or _DEFAULTS
    requested = settings.avoid if avoid is None else avoid
    if requested is None:
        yield call
        return
    phrases = parse_phrases(requested)
    if phrases == (AUTO,):
        phrases = _phrases_from_captions(state)
    unwanted = _phrases_by_prompt(argument_texts(call, "prompt"), phrases)
    if not any(unwanted.values()) or settings.strength == 0:
        yield call
        return
    check_text_encoders_loaded(family, "avoid= encodes texts of its own", "avoid")
    target = _choose_target(context, settings)
    strength = None if settings.strength == AUTO else float(settings.strength)
    if settings.target != "prompt":
        content = AvoidedContent(tuple(phrases_by_row(call, unwanted)), strength)
        context.shared[AvoidedContent] = content

    extended: list[str] = []
    if target != "prompt" and settings.negative == "extend":
        call, extended = add_to_negative_prompt(context, call, unwanted)
    negatives = () if settings.negative == "clean" else argument_texts(call, "negative_prompt")
    with ExitStack() as stack:
        update_cleaner = None
        if target != "prompt":
            # Made before the text encoders are cleaned: it needs their original embeddings.
            update_cleaner = UpdateCleaner(
                family,
                state,
                list(dict.fromkeys(part for parts in unwanted.values() for part in parts)),
                protected=() if settings.negative == "clean" else ("", *negatives),
                unadapted=[
                    t for t in extended if t not in unwanted and not _names_concept(state, t)
                ],
                key_strength=settings.keys,
            )
        if target != "concepts":
            added_tokens = frozenset(n for names in state.token_names.values() for n in names)
            cleaning = EncoderCleaning(phrases, tuple(negatives), strength, added_tokens)
            stack.enter_context(clean_text_encoders(family, cleaning))
        if update_cleaner is not None:
            update_strength = _AUTO_UPDATE_STRENGTH if strength is None else strength
            stack.enter_context(update_cleaner.attach(unwanted, update_strength))
        yield call


def _cleans_all_calls(state: AttachedState, arguments: CallArguments) -> bool:
    settings = state.get_setting(Decor)
    return settings is not None and settings.avoid is not None


#: Adds ``avoid=`` to the arguments of pipelines.
STAGE = Stage(
    "avoid",
    _run,
    arguments=("avoid",),
    setting=Decor,
    acts=_cleans_all_calls,
    repeats=False,
)


def _phrases_by_prompt(
    prompts: Sequence[str], phrases: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Map each prompt to the phrases to avoid in it, without the content words that it contains."""
    if not prompts:
        raise ConfigError(
            "avoid= needs the prompt as text",
            where="prompt",
            fix="give prompt= a text or a list of texts, and no prompt_embeds",
        )
    unwanted = {}
    for prompt in prompts:
        for phrase in phrases:
            if prompt.strip() and find_phrase(prompt, phrase):
                raise ConfigError(
                    f"the phrase to avoid {phrase!r} contains the whole prompt {prompt!r}",
                    where="avoid",
                    fix="give words that the prompt does not ask for",
                )
        parts = {phrase: unmentioned_part(phrase, prompt) for phrase in phrases}
        unwanted[prompt] = tuple(dict.fromkeys(part for part in parts.values() if part))
        mentioned = [phrase for phrase, part in parts.items() if not part]
        if mentioned:
            warn_user(
                f"the prompt {prompt!r} asks for {', '.join(mentioned)} itself, so this is not "
                "avoided in it"
            )
    return unwanted


def _choose_target(context: CallContext, settings: Decor) -> Target:
    """Resolve the target None, and check that any other target is possible."""
    family = context.family
    if settings.target == "prompt":
        return "prompt"
    denoiser = context.pipe.components[family.denoiser_key]
    reason = ""
    if not family.reads_prompts_as_encoded:
        reason = f"family {family.name} has no cross-attention to the encoded prompt"
    elif is_compiled(denoiser):
        reason = "the denoiser is compiled, so its layers cannot be hooked"
    elif not adapted_kv_layers(family, context.state):
        reason = "no unfused concept is attached that adapts keys or values of cross-attention"
    if not reason:
        return settings.target or "concepts"
    if settings.target is not None:
        raise PipelineError(
            f"updates of concepts cannot be cleaned: {reason}",
            where=f"target={settings.target!r}",
            fix='use target="prompt"',
        )
    return "prompt"


def _phrases_from_captions(state: AttachedState) -> tuple[str, ...]:
    """Return the words that all captions of attached concepts share besides the concept's own."""
    words: dict[str, None] = {}
    for attached in state.attached.values():
        shared = attached.concept.info.training.get("captions_share")
        if isinstance(shared, list):  # as written by the trainer; files of others may differ
            words |= dict.fromkeys(word for word in shared if isinstance(word, str))
    if not words:
        raise ConfigError(
            "the captions of the attached concepts share no words besides the concept's own",
            where="avoid",
            fix='give the words to avoid, such as avoid="beach, fence"',
        )
    return tuple(words)


def _names_concept(state: AttachedState, text: str) -> bool:
    infos = [attached.concept.info for attached in state.attached.values()]
    return any(
        find_phrase(words, text) for info in infos for words in (info.trigger_words, *info.triggers)
    )

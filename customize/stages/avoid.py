"""The stage that cleans prompts of what is not wanted: ``avoid=`` (DECOR, arXiv 2412.09169)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from customize.concepts.tokens.prompt_phrases import find_phrase as places_of
from customize.concepts.tokens.prompt_phrases import mentions_phrase
from customize.core.projection import check_strength
from customize.core.scalars import as_float, is_integer
from customize.errors import ConfigError, PipelineError
from customize.families import Family
from customize.families.pipeline_components import uncompiled
from customize.near_names import did_you_mean
from customize.pipeline.call_wrapper import CallArguments, CallContext, Stage
from customize.pipeline.state import AttachedState
from customize.pipeline.user_warnings import warn_user
from customize.pipeline.validation import check_text_encoders_loaded
from customize.stages.decor.kv_updates import ALL, UpdateCleaner, adapted_kv_layers
from customize.stages.decor.negative_prompt import add_to_negative_prompt, argument_texts
from customize.stages.decor.text_encoder import EncoderCleaning, clean_text_encoders
from customize.text import quote

AUTO = "auto"
Rows = Literal["words", "rest", "all"]
Target = Literal["prompt", "concepts", "both"]
Negative = Literal["named", "kept", "cleaned"]

_WHERE = "avoid"
#: Most words and phrases that one call may avoid.
MAX_PHRASES = 256
# "auto" for what concepts add, where no word of the prompt can be hurt; as measured.
_WITHHELD = 1.25


@dataclass(frozen=True)
class Decor:
    """What prompts are cleaned of, and how; ``pipe.load_custom(customize.Decor(...))`` keeps it for
    all calls, of which each can name its own ``avoid=``.

    The paper's is the formula, ``X' = X - strength X V V^T``; everything else here is ours.

    Attributes:
        avoid: what is not wanted: words, or phrases separated by commas, or a list of them; "auto":
            what all captions of a concept's training pictures name beside it; None: nothing, until
            a call names something. Words that a prompt itself asks for stay in that prompt.
        strength: 0 leaves all as it is, 1 removes, up to 2 turns round. "auto": for each prompt,
            the largest up to 1 at which each of its own words keeps nine tenths of its embedding;
            and 1.25 for what concepts add, where the prompt's words are out of its reach.
        rank: how many directions are removed at most; None: all that the words span.
        rows: which of the prompt's embeddings are changed: "words", those of its words; "rest",
            also what comes behind them, end and padding; "all", also what comes before.
        target: "prompt": the embeddings that the text encoders give, as in the paper. "concepts":
            what attached concepts add to the values of the prompt, on families that read it by
            cross-attention as it is encoded (``sd``, ``sdxl``). "both". None: "concepts" where they
            are attached beside the weights of such a family and not compiled, and "prompt"
            elsewhere.
        centred: whether the mean of what the empty text says, much of which is in every word, is
            taken from what is not wanted before its directions are.
        pooled: whether the vector that some encoders give for all of a prompt (SDXL's second,
            Stable Diffusion 3's, FLUX.1's) is cleaned as well, where the target is the prompt.
        negative: what becomes of negative prompts, the empty one among them. "named": where what
            concepts add is cleaned, what is not wanted is named in them as well, unless they are
            given as embeddings, and concepts add nothing to those that call none; elsewhere as
            "kept". "kept": they are left as they are. "cleaned": as prompts are.
        by_head: whether what concepts add is cleaned in each attention head by itself, or in all
            of a layer's together.
        keys: with which share of the strength, from 0 to 1, what concepts add to keys is cleaned,
            beside what they add to values.
        surely: whether what concepts add is left alone as far as it has no more of what is not
            wanted than chance brings
            (:func:`customize.core.projection.overlap_confidence`).
        colours: whether what concepts add is cleaned of the colours of what is not wanted as well,
            which may be their own.
        noise: the least and the most share of noise, 1 at the beginning of a picture and 0 at its
            end, at which what concepts add is cleaned; an encoded prompt is the same throughout.

    Raises:
        ConfigError: a value out of its range.
    """

    avoid: str | Sequence[str] | None = None
    strength: float | Literal["auto"] = "auto"
    rank: int | None = None
    rows: Rows = "words"
    target: Target | None = None
    centred: bool = False
    pooled: bool = False
    negative: Negative = "named"
    by_head: bool = True
    keys: float = 0.25
    surely: bool = True
    colours: bool = False
    noise: tuple[float, float] = ALL

    def __post_init__(self) -> None:
        if self.avoid is not None:
            parse_phrases(self.avoid)
        if not isinstance(self.strength, str) or self.strength != AUTO:
            strength = as_float(self.strength)
            if math.isnan(strength):
                raise ConfigError(
                    f"{quote(self.strength)} is no strength",
                    where="strength",
                    fix='give a number from 0 to 2, or "auto"',
                )
            check_strength(strength)
        if self.rank is not None and not is_integer(self.rank):
            raise ConfigError(
                f"{quote(self.rank)} is no rank",
                where="rank",
                fix="give a whole number from 1, or None",
            )
        for name, value, known in (
            ("rows", self.rows, get_args(Rows)),
            ("target", self.target, (None, *get_args(Target))),
            ("negative", self.negative, get_args(Negative)),
        ):
            if not isinstance(value, str | None) or value not in known:
                raise ConfigError(
                    f"{quote(value)} is none of {', '.join(map(str, known))}",
                    where=name,
                    fix=did_you_mean(value, [str(each) for each in known]),
                )
        if not 0.0 <= as_float(self.keys) <= 1.0:
            raise ConfigError(
                f"{quote(self.keys)} is no share of the strength",
                where="keys",
                fix="give a number from 0, for values alone, to 1, for keys alike",
            )
        pair: Any = self.noise
        two = isinstance(pair, list | tuple) and len(pair) == 2
        low, high = map(as_float, pair) if two else (1.0, 0.0)
        if not 0.0 <= low < high <= 1.0:
            raise ConfigError(
                f"{quote(self.noise)} are no two shares of noise, the less first",
                where="noise",
                fix="give such as (0.5, 1.0) for the first half of the noise levels",
            )

    def __repr__(self) -> str:
        given = ((f.name, getattr(self, f.name)) for f in fields(self))
        defaults = {f.name: f.default for f in fields(self)}
        listed = (f"{name}={value!r}" for name, value in given if value != defaults[name])
        return f"Decor({', '.join(listed)})"

    def __str__(self) -> str:
        words = "what a call names" if self.avoid is None else ", ".join(parse_phrases(self.avoid))
        return f"without {words} (strength {self.strength})"


def parse_phrases(avoid: str | Sequence[str]) -> tuple[str, ...]:
    """What is not wanted, a phrase each; ("auto",) for "auto".

    Raises:
        ConfigError: it names nothing, or is no text.
    """
    listed = avoid.split(",") if isinstance(avoid, str) else avoid
    if not isinstance(listed, Sequence) or not all(map(_is_text, listed)):
        raise ConfigError(
            f"{quote(avoid)} does not say what is not wanted",
            where=_WHERE,
            fix='give words, such as avoid="beach, fence", or a list of them',
        )
    found = tuple(dict.fromkeys(" ".join(each.split()) for each in listed if each.strip()))
    if not found:
        raise ConfigError(
            "nothing is named that is not wanted",
            where=_WHERE,
            fix='give such as avoid="beach, fence", or leave it out',
        )
    if len(found) > MAX_PHRASES:
        raise ConfigError(
            f"{len(found):,} words and phrases are not wanted, of at most {MAX_PHRASES}",
            where=_WHERE,
            fix="name those that matter; each costs time and memory in every call",
        )
    return found


def _is_text(value: object) -> bool:
    """Whether it is a text that a tokenizer reads, without halves of characters."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


@contextmanager
def _run(context: CallContext, call: CallArguments, avoid: Any = None) -> Iterator[CallArguments]:
    pipe, family, state = context.pipe, context.family, context.state
    settings = state.stage_settings.get(Decor) or Decor()
    given = settings.avoid if avoid is None else avoid
    if given is None:
        yield call
        return
    phrases = parse_phrases(given)
    if phrases == (AUTO,):
        phrases = _phrases_from_captions(state)
    asked = _phrases_by_prompt(argument_texts(call, "prompt"), phrases)
    if not any(asked.values()) or settings.strength == 0:
        yield call
        return
    check_text_encoders_loaded(family, "cleaned prompts are compared with others", _WHERE)
    target = _target(pipe, family, state, settings)
    named: list[str] = []
    if target != "prompt" and settings.negative == "named":
        call, named = add_to_negative_prompt(context, call, asked)
    kept = tuple(argument_texts(call, "negative_prompt"))
    with ExitStack() as stack:
        withheld = None
        if target != "prompt":
            left = () if settings.negative == "cleaned" else ("", *kept)
            withheld = UpdateCleaner(
                family,
                state,
                phrases,
                left,
                [text for text in named if text not in asked and not _names_concept(state, text)],
                rank=settings.rank,
                centred=settings.centred,
                noise=settings.noise,
                by_head=settings.by_head,
                keys=settings.keys,
                surely=settings.surely,
                colours=settings.colours,
            )
        if target != "concepts":
            auto = settings.strength == AUTO
            cleaning = EncoderCleaning(
                phrases,
                negatives=() if settings.negative == "cleaned" else kept,
                strength=None if auto else float(settings.strength),
                rank=settings.rank,
                rows=settings.rows,
                centred=settings.centred,
                pooled=settings.pooled,
                triggers=_token_names(state),
            )
            stack.enter_context(clean_text_encoders(family, cleaning))
        if withheld is not None:
            strength = _WITHHELD if settings.strength == AUTO else float(settings.strength)
            stack.enter_context(withheld.applied(asked, strength))
        yield call


#: Adds ``avoid=`` to a pipeline's call; see README.md.
DECOR = Stage(
    ("avoid",),
    _run,
    setting=Decor,
    acts=lambda state: _has_default_phrases(state.stage_settings.get(Decor)),
)


def _has_default_phrases(settings: Decor | None) -> bool:
    """Whether calls are cleaned that name nothing themselves."""
    return settings is not None and settings.avoid is not None


def _phrases_by_prompt(
    prompts: Sequence[str], phrases: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Prompt -> what is not wanted in it, which is nothing that it asks for itself."""
    if not prompts:
        raise ConfigError(
            "what is not wanted can be taken out of words alone",
            where="prompt",
            fix="give prompt= a text or a list of texts, and no prompt_embeds",
        )
    found = {}
    for prompt in prompts:
        for phrase in phrases:
            if prompt.strip() and places_of(prompt, phrase):
                raise ConfigError(
                    f"{phrase!r} is all of the prompt {prompt!r}",
                    where=_WHERE,
                    fix="name what the prompt does not ask for",
                )
        found[prompt] = tuple(phrase for phrase in phrases if not mentions_phrase(phrase, prompt))
        wanted = [phrase for phrase in phrases if phrase not in found[prompt]]
        if wanted:
            warn_user(
                f"the prompt {prompt!r} asks for {', '.join(wanted)} itself, which is then not "
                "avoided in it"
            )
    return found


def _target(pipe: Any, family: Family, state: AttachedState, settings: Decor) -> Target:
    """Where it is done, of those that can be."""
    if settings.target == "prompt":
        return _throughout(settings)
    why = ""
    if not family.reads_prompts_as_encoded:
        why = f"models of family {family.name} do not read prompts by cross-attention as encoded"
    elif _is_compiled(pipe.components[family.denoiser_key]):
        why = "the denoiser is compiled, where its layers cannot be reached"
    elif not adapted_kv_layers(family, state):
        why = "no concept is attached beside the weights that adds to what layers read in prompts"
    if not why:
        return settings.target or "concepts"
    if settings.target is not None:
        raise PipelineError(
            f"what concepts add cannot be cleaned: {why}",
            where=f"target={settings.target!r}",
            fix='use target="prompt"',
        )
    return _throughout(settings)


def _throughout(settings: Decor) -> Target:
    if settings.noise != ALL:
        raise PipelineError(
            "an encoded prompt is the same at all shares of noise, and it is what is cleaned here",
            where=f"noise={settings.noise!r}",
            fix="leave noise out",
        )
    return "prompt"


def _is_compiled(denoiser: Any) -> bool:
    """Whether any of it is compiled, in place or in a wrapper."""
    return uncompiled(denoiser) is not denoiser or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in denoiser.modules()
    )


def _phrases_from_captions(state: AttachedState) -> tuple[str, ...]:
    """What the captions of all attached concepts' pictures share beside the concept."""
    found: dict[str, None] = {}
    for each in state.attached.values():
        words = each.concept.info.training.get("captions_share")
        known = words if isinstance(words, list) else []
        found |= dict.fromkeys(word for word in known if isinstance(word, str))
    if not found:
        raise ConfigError(
            "the captions of the attached concepts name nothing that all their pictures share",
            where=_WHERE,
            fix='say what is not wanted, such as avoid="beach, fence"',
        )
    return tuple(found)


def _names_concept(state: AttachedState, text: str) -> bool:
    """Whether a text calls an attached concept."""
    infos = [each.concept.info for each in state.attached.values()]
    return any(places_of(words, text) for info in infos for words in (info.words, *info.triggers))


def _token_names(state: AttachedState) -> frozenset[str]:
    return frozenset(name for names in state.token_names.values() for name in names)

"""The concepts that a prompt names, and encodings in which each is read by its own words.

CLIP reads each word in the light of those before it: behind ``<rex>``, the rows of ``<tom>`` carry
what makes ``<rex>`` too, and a concept that was learned as the first thing of its captions changes
its colours as the second. So a prompt is encoded anew. The rows of a concept are those of its
class in the prompt, plus what the concept changed of them where it was learned::

    e(tom) = e("a photo of a dog and a cat")[cat] + e("a photo of <tom>")[tom]
             - e("a photo of a cat")[cat]

The first term says where the thing is, and among which others; the difference says what it is. It
is encoded with the update of its concept alone. All other rows are those of the prompt in which
every concept is its class, encoded without their updates. The pooled prompt (SDXL, SD3, FLUX) acts
on the whole picture; SDXL's stays that of the whole prompt, and the others' are encoded with each
concept's update at its own tokens.

T5 and LLMs read triggers letter by letter, without learned tokens, and take no updates, so their
rows carry nothing that a concept learned: other concepts of the same names have the same rows, bit
for bit. There is nothing to cure, and these rows stay as the pipeline encodes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from customize.concepts.caption_template import DEFAULT_CAPTION, caption_template, prefix_of
from customize.concepts.tokens.prompt_phrases import find_phrase
from customize.core.routing import rank_mask
from customize.errors import ConfigError
from customize.families import Family
from customize.families.token_layout import PromptText
from customize.pipeline.rank_channels import RankChannels
from customize.pipeline.state import AttachedState
from customize.pipeline.tokenizer_subclass import expand_text
from customize.stages.articles import begins_phrase
from customize.stages.decor.phrase_rows import count_tokens
from customize.text import quote, with_article

Span = tuple[int, int]
# The index of the concept whose update a text is encoded with, or None, and the text.
_Text = tuple[int | None, str]


@dataclass(frozen=True, eq=False)
class NamedConcept:
    """A concept that a prompt names.

    Attributes:
        index: Of the concept among the attached ones.
        name: The concept's name.
        class_word: Its class; empty if unknown.
        spans: (start, end) of its words in the prompt.
        prefix: What stands before it in the caption that it was learned by.
    """

    index: int
    name: str
    class_word: str
    spans: tuple[Span, ...]
    prefix: str = prefix_of(DEFAULT_CAPTION)


@dataclass(frozen=True, eq=False)
class RoutedPrompt:
    """One prompt of a call.

    Attributes:
        prompt: As given to the pipeline.
        named: The concepts that it names; empty if nothing is routed.
        encoded: (length, width), as the pipeline encodes it.
        rows: (length, width), the encoding in its place.
        tokens: For each named concept the positions of its tokens.
        pooled: (width,), in place of the pooled prompt; None to leave it.
    """

    prompt: str
    named: tuple[NamedConcept, ...]
    encoded: Tensor
    rows: Tensor
    tokens: tuple[tuple[int, ...], ...]
    pooled: Tensor | None = None


def named_concepts(prompt: str, state: AttachedState) -> tuple[NamedConcept, ...]:
    """Find the attached concepts whose words a prompt contains.

    Raises:
        ConfigError: Two concepts share words of the prompt.
    """
    named: list[NamedConcept] = []
    for index, (name, attached) in enumerate(state.attached.items()):
        info = attached.concept.info
        phrases = dict.fromkeys(filter(None, (*info.triggers, info.trigger_words)))
        spans = tuple(dict.fromkeys(s for phrase in phrases for s in find_phrase(phrase, prompt)))
        for other in named:
            if any(a < d and c < b for a, b in spans for c, d in other.spans):
                raise ConfigError(
                    f"the concepts {other.name} and {name} share words of the prompt "
                    f"{quote(prompt, 80)}",
                    where="together",
                    fix="load one of them with a name of its own: names=",
                )
        if spans:
            prefix = prefix_of(caption_template(info.training))
            named.append(NamedConcept(index, name, info.class_word, spans, prefix))
    return tuple(named)


def wordless_concepts(state: AttachedState) -> tuple[int, ...]:
    """Return the indices of attached concepts without words, such as styles of LoRA files.

    They act on the whole picture and on all words, as without routing.
    """
    return tuple(
        index
        for index, attached in enumerate(state.attached.values())
        if not any((*attached.concept.info.triggers, attached.concept.info.trigger_words))
    )


def with_classes(
    prompt: str, named: Sequence[NamedConcept], kept: NamedConcept | None
) -> tuple[str, tuple[tuple[Span, ...], ...]]:
    """Replace concepts in a prompt by their classes: ``<rex> and <tom>``, ``a dog and <tom>``.

    Args:
        prompt: The prompt.
        named: All concepts that it names. One without a class stays as it is.
        kept: The concept that stays; None to replace all.

    Returns:
        The text, and the spans of each named concept, or of its class, in it.
    """
    words = {
        span: each.class_word if each is not kept else "" for each in named for span in each.spans
    }
    text, stop, moved = "", 0, {}
    for span in sorted(words):
        text += prompt[stop : span[0]]
        word = words[span]
        if not word:
            word = prompt[slice(*span)]
        elif begins_phrase(text):
            word = with_article(word)
        moved[span] = (len(text), len(text) + len(word))
        text, stop = text + word, span[1]
    return text + prompt[stop:], tuple(tuple(moved[s] for s in each.spans) for each in named)


def token_positions(family: Family, prompt: str, spans: Sequence[Span]) -> tuple[int, ...]:
    """Return the rows of words in the encoded prompt.

    Args:
        family: The models of the pipeline.
        prompt: The prompt.
        spans: (start, end) of the words.

    Raises:
        ConfigError: The text encoders do not read all of these words, or at different positions.
    """
    rows = _clip_positions(family, prompt, spans) if family.has_clip_rows else ()
    text = family.prompt_text(prompt)
    return rows if text is None else (*rows, *_find_rows(text, prompt, spans))


def _find_rows(read: PromptText, prompt: str, spans: Sequence[Span]) -> list[int]:
    """Return the rows of words in what a text encoder without learned tokens reads."""
    begin = read.text.rfind(prompt)
    if begin < 0:
        raise ConfigError(
            f"the text encoder reads the prompt {quote(prompt, 80)} as another text",
            where="together",
            fix="leave out repeated spaces, line breaks and special tokens",
        )
    offsets = read.tokenizer(
        read.text, return_offsets_mapping=True, add_special_tokens=read.special_tokens
    ).offset_mapping
    rows = []
    for span in spans:
        # Offsets are those in the text with expanded triggers.
        start, end = (
            len(expand_text(read.text[: begin + position], read.tokenizer)) for position in span
        )
        found = [
            index + read.shift
            for index, (first, last) in enumerate(offsets)
            if first < end and start < last
        ]
        if not found or found[-1] >= read.rows:
            raise _too_long(prompt)
        rows += found
    return rows


def _too_long(prompt: str) -> ConfigError:
    return ConfigError(
        f"the prompt {quote(prompt, 80)} is longer than the text encoder reads",
        where="together",
        fix="shorten it, or name the concepts nearer to its beginning",
    )


def _clip_positions(family: Family, prompt: str, spans: Sequence[Span]) -> tuple[int, ...]:
    """Return the positions of words among CLIP's tokens, which all CLIP encoders share."""
    found: set[tuple[int, ...]] = set()
    for dictionary in family.token_dictionaries():
        tokenizer = dictionary.tokenizer
        positions = _read_positions(tokenizer, prompt, spans)
        if not positions or positions[-1] >= tokenizer.model_max_length - 1:
            raise _too_long(prompt)
        found.add(positions)
    if len(found) != 1:
        raise ConfigError(
            f"the text encoders split the prompt {quote(prompt, 80)} into different tokens",
            where="together",
            fix="name the concepts by their triggers",
        )
    return found.pop()


def _read_positions(tokenizer: Any, prompt: str, spans: Sequence[Span]) -> tuple[int, ...]:
    positions: list[int] = []
    for start, end in spans:
        counts = (count_tokens(tokenizer, prompt[:stop]) for stop in (start, end))
        positions += range(*(1 + count for count in counts))  # behind the token of begin
    return tuple(positions)


@dataclass(frozen=True, eq=False)
class _Term:
    """A term of the sum that rows of a prompt are.

    Attributes:
        text: The text that it is encoded from.
        positions: Tokens of the text: one for all rows, or one for each.
        sign: 1 or -1.
    """

    text: _Text
    positions: Sequence[int]
    sign: int = 1


# Tokens of a prompt, and the terms of their rows.
_Reading = tuple[Sequence[int], Sequence[_Term]]


def encode_routed(
    family: Family,
    state: AttachedState,
    channels: Sequence[RankChannels],
    prompts: Sequence[str],
    fewest: int = 1,
) -> list[RoutedPrompt]:
    """Encode prompts with each concept read by its own words.

    Args:
        family: The models of the pipeline.
        state: The concepts attached to them.
        channels: The ranks of their layers.
        prompts: The prompts of a call.
        fewest: Concepts that a prompt names for it to be routed.

    Raises:
        ConfigError: See :func:`named_concepts` and :func:`token_positions`.
    """
    named = [named_concepts(prompt, state) for prompt in prompts]
    named = [concepts if len(concepts) >= fewest else () for concepts in named]
    tokens = [
        tuple(token_positions(family, prompt, each.spans) for each in concepts)
        for prompt, concepts in zip(prompts, named, strict=True)
    ]
    readings: list[list[_Reading]] = [[] for _ in prompts]
    if family.has_clip_rows:
        readings = [list(_readings(family, *each)) for each in zip(prompts, named, strict=True)]
    texts: dict[int | None, dict[str, None]] = {}
    for index, text in (term.text for each in readings for _, terms in each for term in terms):
        texts.setdefault(index, {})[text] = None
    read: dict[_Text, Tensor] = {}
    pooled: Tensor | None = None
    with torch.no_grad():
        conditions = family.encode_prompts(list(prompts))
        encoded = [
            next(iter(family.denoiser_kwargs({k: v[[i]] for k, v in conditions.items()}).values()))[
                0
            ]
            for i in range(len(prompts))
        ]
        if "pooled_prompt_embeds" in conditions and not family.reads_prompts_as_encoded:
            with _each_at_own_tokens(family, channels, state, prompts, named):
                pooled = family.encode_clip_prompts(list(prompts))["pooled_prompt_embeds"]
        for concept, each in texts.items():
            with only_concept(channels, concept, state):
                rows = family.encode_clip_prompts(list(each))["prompt_embeds"]
            read |= {(concept, text): row for text, row in zip(each, rows, strict=True)}
    length = _clip_length(family) if family.has_clip_rows else 0
    routed = []
    for k, original in enumerate(encoded):
        rows = original.clone() if readings[k] else original
        # Layers may have tokens of their own, and T5's rows follow those of CLIP.
        clip = len(rows) if family.reads_prompts_as_encoded else length
        for to, terms in readings[k]:
            for start in range(0, clip, length):
                rows[[start + position for position in to]] = sum(
                    (_read_term(read, term, start) for term in terms[1:]),
                    _read_term(read, terms[0], start),
                ).expand(len(to), -1)
        own = None if pooled is None or not named[k] else pooled[k]
        routed.append(RoutedPrompt(prompts[k], named[k], original, rows, tokens[k], own))
    return routed


def _read_term(read: Mapping[_Text, Tensor], term: _Term, start: int) -> Tensor:
    """Return rows (positions, width) for the layer whose tokens begin at ``start``."""
    rows = read[term.text]
    first = start % len(rows)  # the tokens may be the same for all layers
    return term.sign * rows[[first + position for position in term.positions]]


def _readings(family: Family, prompt: str, named: Sequence[NamedConcept]) -> Iterator[_Reading]:
    """Yield how CLIP's rows of a prompt are computed; nothing without concepts."""
    if not named:
        return
    length = _clip_length(family)
    tokens = [_clip_positions(family, prompt, each.spans) for each in named]
    classes, spans = with_classes(prompt, named, None)
    rest = _without(length, tokens)
    others = _without(length, [_clip_positions(family, classes, each) for each in spans])
    others += others[-1:] * (len(rest) - len(others))  # more padding
    yield rest, [_Term((None, classes), others[: len(rest)])]
    for index, (each, to) in enumerate(zip(named, tokens, strict=True)):
        if not each.class_word:  # its rows in the prompt, behind the classes of the others
            text, moved = with_classes(prompt, named, each)
            yield to, [_Term((each.index, text), _clip_positions(family, text, moved[index]))]
            continue
        plain, class_at = _read_alone(family, each.prefix, with_article(each.class_word))
        for span, class_span in zip(each.spans, spans[index], strict=True):
            alone, alone_at = _read_alone(family, each.prefix, prompt[slice(*span)])
            in_place = _clip_positions(family, classes, [class_span])
            yield (
                _clip_positions(family, prompt, [span]),
                [
                    _Term((None, classes), in_place[-1:]),
                    _Term((each.index, alone), alone_at),
                    _Term((None, plain), class_at[-1:], -1),
                ],
            )


def _read_alone(family: Family, prefix: str, words: str) -> tuple[str, tuple[int, ...]]:
    """Return the caption by which words are learned, and their tokens."""
    text = f"{prefix}{words}"
    return text, _clip_positions(family, text, [(len(prefix), len(text))])


def _clip_length(family: Family) -> int:
    return int(family.token_dictionaries()[0].tokenizer.model_max_length)


def _without(length: int, positions: Sequence[Sequence[int]]) -> list[int]:
    taken = {position for each in positions for position in each}
    return [position for position in range(length) if position not in taken]


@contextmanager
def only_concept(
    channels: Sequence[RankChannels], index: int | None, state: AttachedState
) -> Iterator[None]:
    """Make the text encoders compute with the updates of one concept and of wordless ones alone.

    Args:
        channels: The ranks of all adapted layers.
        index: Of the concept among the attached ones; None for no concept.
        state: The attached concepts.
    """
    masks = torch.zeros(1, len(state.attached), 1)
    masks[:, wordless_concepts(state)] = 1.0
    if index is not None:
        masks[:, index] = 1.0
    with _text_encoder_masks(channels, lambda component: masks):
        yield


@contextmanager
def _each_at_own_tokens(
    family: Family,
    channels: Sequence[RankChannels],
    state: AttachedState,
    prompts: Sequence[str],
    named: Sequence[tuple[NamedConcept, ...]],
) -> Iterator[None]:
    """Make the text encoders compute with each concept's update at the tokens of its words."""
    masks = {}
    for dictionary in family.token_dictionaries():
        length = _clip_length(family)
        mask = masks[dictionary.key] = torch.ones(len(prompts), len(state.attached), length)
        for row, (prompt, words) in enumerate(zip(prompts, named, strict=True)):
            mask[row] = 0.0 if words else 1.0
            mask[row, wordless_concepts(state)] = 1.0
            for each in words:
                positions = _read_positions(dictionary.tokenizer, prompt, each.spans)
                mask[row, each.index, [p for p in positions if p < length]] = 1.0
    with _text_encoder_masks(channels, masks.__getitem__):
        yield


@contextmanager
def _text_encoder_masks(
    channels: Sequence[RankChannels], masks: Callable[[str], Tensor]
) -> Iterator[None]:
    """Mask the ranks of text encoders; masks(component) is (batch or 1, concepts, tokens or 1)."""
    with ExitStack() as stack:
        for channel in channels:
            if channel.component.startswith("text_encoder"):
                mask = rank_mask(masks(channel.component), channel.owners)
                stack.callback(channel.mask(mask.to, _every_entry).remove)
        yield


def _every_entry(middle: Tensor) -> Tensor:
    return torch.ones(len(middle), dtype=torch.bool, device=middle.device)

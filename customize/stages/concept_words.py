"""The concepts that a prompt names, and encodings in which each is read by its own words.

CLIP reads each word in the light of those before it: behind ``<rex>``, the rows of ``<tom>`` carry
what makes ``<rex>`` too. So a prompt is encoded anew, twice:

- for keys, which say where a concept is: the rows of each trigger are taken from the prompt in
  which the other concepts are their class ("a photo of a dog and <tom>"), which keeps their number
  and order;
- for values, which say what it is: from the prompt that ends with it as the first thing
  ("a photo of <tom>"), as concepts are learned. In keys these rows draw all things in one place.

The rows of a trigger are encoded with its concept's update alone. All other rows are taken from the
prompt in which every concept is its class, encoded without their updates. The pooled prompt of SDXL
stays that of the whole prompt.

Where prompt and picture share one attention (SD3), a row is both key and value, and CLIP's rows are
the keys above. A pooled prompt (SD3, FLUX) acts on the whole picture; it is that of the whole
prompt, with each concept's update at its own tokens.

T5 and LLMs read triggers letter by letter, without learned tokens, and take no updates, so their
rows carry nothing that a concept learned: other concepts of the same names have the same rows, bit
for bit. There is nothing to cure, and these rows stay as the pipeline encodes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from customize.concepts.tokens.prompt_phrases import find_phrase
from customize.core.routing import rank_mask
from customize.errors import ConfigError
from customize.families import Family
from customize.families.token_layout import PromptText
from customize.pipeline.rank_channels import RankChannels
from customize.pipeline.state import AttachedState
from customize.pipeline.tokenizer_subclass import expand_text
from customize.stages.decor.phrase_rows import count_tokens

_DETERMINER = re.compile(
    r"(^|\s)(a|an|the|this|that|my|your|his|her|its|our|their)\s+$", re.IGNORECASE
)

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class NamedConcept:
    """A concept that a prompt names.

    Attributes:
        index: Of the concept among the attached ones.
        name: The concept's name.
        class_word: Its class; empty if unknown.
        spans: (start, end) of its words in the prompt.
    """

    index: int
    name: str
    class_word: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, eq=False)
class RoutedPrompt:
    """One prompt of a call.

    Attributes:
        prompt: As given to the pipeline.
        named: The concepts that it names; empty if they are fewer than two: nothing is routed.
        encoded: (length, width), as the pipeline encodes it.
        keys: (length, width), the encoding in its place, for the keys of cross-attention.
        values: (length, width), that for its values.
        tokens: For each named concept the positions of its tokens.
        pooled: (width,), in place of the pooled prompt; None to leave it.
    """

    prompt: str
    named: tuple[NamedConcept, ...]
    encoded: Tensor
    keys: Tensor
    values: Tensor
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
                    f"the concepts {other.name} and {name} share words of the prompt {prompt!r}",
                    where="together",
                    fix="load one of them with a name of its own: names=",
                )
        if spans:
            named.append(NamedConcept(index, name, info.class_word, spans))
    return tuple(named)


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
        elif not _DETERMINER.search(text):
            word = ("an " if word[0] in "aeiou" else "a ") + word
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
            f"the text encoder reads the prompt {prompt!r} as another text",
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
        f"the prompt {prompt!r} is longer than the text encoder reads",
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
            f"the text encoders split the prompt {prompt!r} into different tokens",
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
class _Copy:
    """Rows to copy from the encoding of another text.

    Attributes:
        concept: Index of the concept whose update the text is encoded with; None: without any.
        text: The text.
        positions: Tokens of the text.
        to: As many tokens of the prompt.
        is_value: Whether only the values get them.
    """

    concept: int | None
    text: str
    positions: Sequence[int]
    to: Sequence[int]
    is_value: bool = False


def encode_routed(
    family: Family, state: AttachedState, channels: Sequence[RankChannels], prompts: Sequence[str]
) -> list[RoutedPrompt]:
    """Encode prompts with each concept read by its own words.

    Args:
        family: The models of the pipeline.
        state: The concepts attached to them.
        channels: The ranks of their layers.
        prompts: The prompts of a call.

    Raises:
        ConfigError: See :func:`named_concepts` and :func:`token_positions`.
    """
    named = [named_concepts(prompt, state) for prompt in prompts]
    named = [concepts if len(concepts) > 1 else () for concepts in named]
    tokens = [
        tuple(token_positions(family, prompt, each.spans) for each in concepts)
        for prompt, concepts in zip(prompts, named, strict=True)
    ]
    copies: list[list[_Copy]] = [[] for _ in prompts]
    if family.has_clip_rows:
        copies = [list(_copies(family, *each)) for each in zip(prompts, named, strict=True)]
    texts: dict[int | None, dict[str, None]] = {}
    for copy in (copy for each in copies for copy in each):
        texts.setdefault(copy.concept, {})[copy.text] = None
    read: dict[tuple[int | None, str], Tensor] = {}
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
            with _each_at_own_tokens(family, channels, len(state.attached), prompts, named):
                pooled = family.encode_clip_prompts(list(prompts))["pooled_prompt_embeds"]
        for concept, each in texts.items():
            with only_concept(channels, concept, len(state.attached)):
                rows = family.encode_clip_prompts(list(each))["prompt_embeds"]
            read |= {(concept, text): row for text, row in zip(each, rows, strict=True)}
    routed = []
    for k, rows in enumerate(encoded):
        keys = values = rows
        if copies[k]:
            keys = rows.clone()
            values = rows.clone() if family.reads_prompts_as_encoded else keys
        for copy in copies[k]:
            source = read[copy.concept, copy.text]
            length = _clip_length(family)
            # Layers may have tokens of their own, and T5's rows follow those of CLIP.
            starts = range(0, len(rows) if family.reads_prompts_as_encoded else length, length)
            for start in starts:
                shared = start % len(source)  # the tokens may be the same for all layers
                copied = source[[shared + p for p in copy.positions]]
                for target in (values,) if copy.is_value else (keys, values):
                    target[[start + p for p in copy.to]] = copied
        own = None if pooled is None or not named[k] else pooled[k]
        routed.append(RoutedPrompt(prompts[k], named[k], rows, keys, values, tokens[k], own))
    return routed


def _copies(family: Family, prompt: str, named: Sequence[NamedConcept]) -> Iterator[_Copy]:
    """Yield what replaces CLIP's rows of a prompt, in this order; nothing without concepts."""
    if not named:
        return
    length = _clip_length(family)
    tokens = [_clip_positions(family, prompt, each.spans) for each in named]
    text, spans = with_classes(prompt, named, None)
    rest = _without(length, tokens)
    others = _without(length, [_clip_positions(family, text, each) for each in spans])
    others += others[-1:] * (len(rest) - len(others))  # more padding
    yield _Copy(None, text, others[: len(rest)], rest)
    for index, each in enumerate(named):
        text, spans = with_classes(prompt, named, each)
        positions = _clip_positions(family, text, spans[index])
        yield _Copy(each.index, text, positions, tokens[index])
    if not family.reads_prompts_as_encoded:
        return  # a row is both key and value
    before = prompt[: min(start for each in named for start, _ in each.spans)]
    for each, to in zip(named, tokens, strict=True):
        text = before + prompt[slice(*each.spans[0])]
        at = _clip_positions(family, text, [(len(before), len(text))])
        repeats = -(-len(to) // len(at))
        yield _Copy(each.index, text, (at * repeats)[: len(to)], to, is_value=True)


def _clip_length(family: Family) -> int:
    return int(family.token_dictionaries()[0].tokenizer.model_max_length)


def _without(length: int, positions: Sequence[Sequence[int]]) -> list[int]:
    taken = {position for each in positions for position in each}
    return [position for position in range(length) if position not in taken]


@contextmanager
def only_concept(
    channels: Sequence[RankChannels], index: int | None, concepts: int
) -> Iterator[None]:
    """Make the text encoders compute with the update of one concept alone.

    Args:
        channels: The ranks of all adapted layers.
        index: Of the concept among the attached ones; None for no concept.
        concepts: The number of attached concepts.
    """
    masks = torch.zeros(1, concepts, 1)
    if index is not None:
        masks[:, index] = 1.0
    with _text_encoder_masks(channels, lambda component: masks):
        yield


@contextmanager
def _each_at_own_tokens(
    family: Family,
    channels: Sequence[RankChannels],
    concepts: int,
    prompts: Sequence[str],
    named: Sequence[tuple[NamedConcept, ...]],
) -> Iterator[None]:
    """Make the text encoders compute with each concept's update at the tokens of its words."""
    masks = {}
    for dictionary in family.token_dictionaries():
        length = _clip_length(family)
        mask = masks[dictionary.key] = torch.ones(len(prompts), concepts, length)
        for row, (prompt, words) in enumerate(zip(prompts, named, strict=True)):
            mask[row] = 0.0 if words else 1.0
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
                stack.callback(channel.mask(mask.to).remove)
        yield

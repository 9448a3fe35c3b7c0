"""Text encoders whose answers lack what is not wanted (DECOR, arXiv 2412.09169).

This goes on at the encoders' border: whoever encodes a prompt within it, a standard pipeline, a
modular one or a stage, gets it cleaned, whatever it reads of the answer: the last states, those of
several layers, with learned tokens or without. Each encoder, and each of its layers, has a span of
its own, as what they say lies in spaces of their own.

Which rows of an answer belong to the prompt's words is told by comparing with the empty prompt:
what both have in common at the beginning and at the end is no word of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from customize.concepts.tokens.prompt_phrases import mentions_phrase
from customize.core.projection import max_strength, principal_directions, project_out
from customize.errors import ConfigError, PipelineError
from customize.families import Family
from customize.pipeline.call_wrapper import capture_call_scope

Path = tuple[str | int, ...]
Ids = tuple[int, ...]

#: The share of its length that each word of a prompt keeps where the strength goes by that.
MIN_LENGTH_SHARE = 0.9

_WHERE = "avoid"


@dataclass(frozen=True)
class EncoderCleaning:
    """How prompts are cleaned.

    Attributes:
        phrases: what is not wanted.
        negatives: texts that are encoded as they are.
        strength: in [0, 2]; None: for each prompt, the largest up to 1 at which its own words keep
            :data:`MIN_LENGTH_SHARE` of their length.
        rank: how many directions at most.
        rows: which of the prompt's are changed: "words", its words; "rest", also what comes behind
            them; "all".
        centred: whether the mean of what the empty text says, but for its beginning, is taken from
            what is not wanted first.
        pooled: whether an encoder's one vector for all of a text is changed too.
        triggers: vocabulary entries that are no words of the prompt's own.
    """

    phrases: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    strength: float | None = 1.0
    rank: int | None = None
    rows: str = "words"
    centred: bool = False
    pooled: bool = False
    triggers: frozenset[str] = frozenset()


@contextmanager
def clean_text_encoders(family: Family, cleaning: EncoderCleaning) -> Iterator[None]:
    """Within it, the text encoders answer every prompt without what is not wanted.

    Raises:
        ConfigError: a phrase that has no words for any encoder, or more than it reads.
        PipelineError: an encoder has been freed, or no prompt has been encoded.
    """
    texts = list(dict.fromkeys(["", *cleaning.phrases, *cleaning.negatives]))
    encoders = {
        key: _CleanedEncoder(tokenizer_for(family, key), cleaning)
        for key in family.all_text_encoders
    }
    with ExitStack() as stack:
        for key, encoder in encoders.items():
            for handle in encoder.follow(family.all_text_encoders[key]):
                stack.callback(handle.remove)
        with torch.no_grad():
            family.encode_prompts(texts)
        read = [encoder for encoder in encoders.values() if encoder.learn(texts)]
        yield
    if not any(encoder.matched for encoder in read):
        raise PipelineError(
            "no prompt was encoded, so the picture was drawn with all that is to be avoided",
            where=_WHERE,
            fix="give prompt= in words, and no prompt_embeds",
        )


def phrase_too_long(phrase: str, most: int) -> ConfigError:
    """Of a phrase that has more tokens than an encoder reads."""
    return ConfigError(
        f"{phrase!r} is longer than the {most} tokens that the text encoder reads",
        where=_WHERE,
        fix="name what is not wanted in a few words each, separated by commas",
    )


@dataclass(frozen=True)
class _EncodedText:
    """One text as an encoder is given it.

    Attributes:
        ids: all, with the padding.
        start, stop: where the ids lie that are no padding.
        read: where those end that the encoder reads, which may be some padding as well.
    """

    ids: Ids
    start: int
    stop: int
    read: int

    @property
    def body(self) -> Ids:
        return self.ids[self.start : self.stop]


class _CleanedEncoder:
    """What one encoder says of what is not wanted, and how it is kept from saying it of prompts.

    Attributes:
        matched: whether a prompt has come by.
    """

    def __init__(self, tokenizer: Any, cleaning: EncoderCleaning) -> None:
        self.tokenizer, self.cleaning = tokenizer, cleaning
        self.matched = False
        self._is_ours = capture_call_scope()
        self._learning = True
        self._read: list[tuple[_EncodedText, dict[Path, Tensor]]] = []
        self._padding: int | None = None
        self._empty: Ids = ()
        self._kept: set[Ids] = set()
        self._said: dict[str, list[tuple[range, dict[Path, Tensor]]]] = {}
        self._mean: dict[Path, Tensor] = {}
        self._spans: dict[tuple[Path, tuple[str, ...]], Tensor] = {}

    def follow(self, encoder: Any) -> list[Any]:
        """Hooks around an encoder; their handles."""
        return [
            encoder.register_forward_pre_hook(self._before, with_kwargs=True),
            encoder.register_forward_hook(self._after, with_kwargs=True),
        ]

    def learn(self, texts: Sequence[str]) -> bool:
        """Take what was just encoded for the texts, the first of which is empty.

        Returns:
            Whether this encoder was given any.
        """
        self._learning = False
        each = len(self._read) // len(texts)  # several where tokens differ from layer to layer
        if not each:
            return False
        empty, states = self._read[0]
        self._empty = empty.body
        # The first row is of the beginning, and the same in all texts.
        rows = slice(empty.start + (empty.read > empty.start + 1), empty.read)
        self._mean = {p: o if o.ndim == 1 else o[rows].mean(0) for p, o in states.items()}
        for number, text in enumerate(texts):
            own = self._read[number * each : (number + 1) * each]
            if text in self.cleaning.phrases:
                self._check(text, own[0][0])
                self._said[text] = [(self._words(row), states) for row, states in own]
            else:
                self._kept |= {row.body for row, _ in own}
        self._read = []
        return True

    def _check(self, phrase: str, row: _EncodedText) -> None:
        words = self._words(row)
        asked = self.tokenizer(phrase, add_special_tokens=False)["input_ids"]
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        said = [k for k in words if self.tokenizer.decode([row.ids[k]]).strip()]
        if all(row.ids[k] == unknown for k in said):
            raise ConfigError(
                f"{phrase!r} has no words that the text encoder knows",
                where=_WHERE,
                fix="use other words",
            )
        # An end that pads as well does not count as a part of it.
        if len(words) < len(asked) and row.stop - row.start >= len(row.ids) - 1:
            raise phrase_too_long(phrase, len(words))

    def _before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._learning and _input_ids(args, kwargs) is not None:
            return args, kwargs | {"output_hidden_states": True}  # pipelines read various ones
        return None

    def _after(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        ids = _input_ids(args, kwargs)
        if ids is None or not self._is_ours():
            return None
        rows = self._rows(ids, kwargs.get("attention_mask", args[1] if len(args) > 1 else None))
        if self._learning:
            for number, row in enumerate(rows):
                self._read.append((row, dict(_text_states(output, len(rows), number))))
            return None
        groups = self._groups(rows)
        self.matched |= bool(groups)
        return _map_tensors(output, (), lambda path, value: self._clean(path, value, rows, groups))

    def _rows(self, ids: Tensor, mask: Tensor | None) -> list[_EncodedText]:
        width = ids.shape[-1]
        lines = ids.reshape(-1, width).tolist()
        if mask is not None and mask.shape[-1] == width and mask.ndim == ids.ndim:
            places = [
                [k for k, own in enumerate(m) if own] for m in mask.reshape(-1, width).tolist()
            ]
            ends = [(own[0], own[-1] + 1, own[-1] + 1) if own else (0, 0, 0) for own in places]
        else:
            if self._padding is None:  # the empty text, of which the most is padding
                self._padding = lines[0][-1] if lines[0][-2:-1] == lines[0][-1:] else -1
            ends = [(0, _length_without_padding(line, self._padding), width) for line in lines]
        return [_EncodedText(tuple(line), *own) for line, own in zip(lines, ends, strict=True)]

    def _words(self, row: _EncodedText) -> range:
        """Where the words of a text are."""
        body, empty = row.body, self._empty
        most = min(len(body), len(empty))
        first = next((k for k in range(most) if body[k] != empty[k]), most)
        most -= first
        last = next((k for k in range(most) if body[-1 - k] != empty[-1 - k]), most)
        if 2 * (first + last) < len(empty):
            raise PipelineError(
                "this pipeline tells the text encoder more than the prompt, and in another way "
                "than is known here",
                where=_WHERE,
                fix="use the family's pipeline for pictures from a prompt",
            )
        return range(row.start + first, row.stop - last)

    def _groups(self, rows: Sequence[_EncodedText]) -> dict[tuple[str, ...], dict[int, range]]:
        """What is not wanted -> the rows in which it is not, and where their words are."""
        found: dict[tuple[str, ...], dict[int, range]] = {}
        known: dict[Ids, tuple[tuple[str, ...], range] | None] = {}
        for number, row in enumerate(rows):
            if row.ids not in known:
                known[row.ids] = self._asked(row)
            asked = known[row.ids]
            if asked is not None:
                found.setdefault(asked[0], {})[number] = asked[1]
        return found

    def _asked(self, row: _EncodedText) -> tuple[tuple[str, ...], range] | None:
        """What is to be taken out of one text; None out of what is no prompt."""
        if row.body in self._kept:
            return None
        words = self._words(row)
        text = self.tokenizer.decode([row.ids[k] for k in words])
        if not text.strip():
            return None
        return tuple(
            each for each in self.cleaning.phrases if not mentions_phrase(each, text)
        ), words

    def _clean(
        self,
        path: Path,
        value: Tensor,
        rows: Sequence[_EncodedText],
        groups: Mapping[tuple[str, ...], Mapping[int, range]],
    ) -> Tensor:
        """One tensor of an answer: (batch, length, width), also of several texts in a row; or, for
        all words of a text together, (batch, width)."""
        if "logits" in path:
            return value
        if _is_pooled(value, len(rows)):
            return self._clean_pooled(path, value, groups) if self.cleaning.pooled else value
        if value.ndim != 3 or value[..., 0].numel() != _token_count(rows):
            return value
        own = value.reshape(len(rows), -1, value.shape[-1]).clone()
        for phrases, places in groups.items():
            directions = self._span(path, phrases)
            if len(directions):
                strength = own.new_zeros(len(places), own.shape[1], dtype=torch.float32)
                for line, (number, words) in zip(strength, places.items(), strict=True):
                    part = _cleaned_rows(self.cleaning.rows, words, rows[number])
                    line[part] = self._strength(own[number], words, rows[number], directions)
                chosen = list(places)
                own[chosen] = project_out(own[chosen], directions, strength)
        return own.reshape(value.shape)

    def _clean_pooled(
        self, path: Path, value: Tensor, groups: Mapping[tuple[str, ...], Mapping[int, range]]
    ) -> Tensor:
        own = value.clone()
        for phrases, places in groups.items():
            directions = self._span(path, phrases)
            for number in places if len(directions) else ():
                given, row = self.cleaning.strength, own[number : number + 1]
                strength = (
                    max_strength(row, directions, MIN_LENGTH_SHARE)[None]
                    if given is None
                    else given
                )
                own[number] = project_out(row, directions, strength)[0]
        return own

    def _strength(
        self, states: Tensor, words: range, row: _EncodedText, directions: Tensor
    ) -> float | Tensor:
        if self.cleaning.strength is not None:
            return self.cleaning.strength
        names = self.tokenizer.convert_ids_to_tokens(list(row.ids))
        plain = [k for k in words if names[k] not in self.cleaning.triggers]
        return max_strength(states[plain], directions, MIN_LENGTH_SHARE)

    def _span(self, path: Path, phrases: tuple[str, ...]) -> Tensor:
        """The directions of one tensor of the answer that are not wanted."""
        if (path, phrases) not in self._spans:
            said = [each for phrase in phrases for each in self._said[phrase]]
            found = [(words, states[path]) for words, states in said]
            rows = [o[None] if o.ndim == 1 else o[words.start : words.stop] for words, o in found]
            mean = self._mean[path] if self.cleaning.centred else None
            self._spans[path, phrases] = (
                principal_directions(torch.cat(rows), self.cleaning.rank, mean)
                if rows
                else torch.zeros(0, 1)
            )
        return self._spans[path, phrases]


def _cleaned_rows(which: str, words: range, row: _EncodedText) -> slice:
    first = 0 if which == "all" else words.start
    return slice(first, words.stop if which == "words" else len(row.ids))


def _token_count(rows: Sequence[_EncodedText]) -> int:
    return sum(len(row.ids) for row in rows)


def _is_pooled(value: Tensor, count: int) -> bool:
    """Whether a tensor has one vector for each text."""
    return value.ndim == 2 and len(value) == count and value.is_floating_point()


def _input_ids(args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The ids that an encoder is given: (batch, length) or (batch, texts, length)."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    known = isinstance(ids, Tensor) and ids.ndim >= 2 and not ids.is_floating_point()
    return ids if known else None


def _length_without_padding(line: Sequence[int], padding: int) -> int:
    """How long a text is without the padding behind it."""
    end = len(line)
    while end and line[end - 1] == padding:
        end -= 1
    return end


def _text_states(output: Any, count: int, number: int) -> Iterator[tuple[Path, Tensor]]:
    """What an answer to so many texts says of one of them."""
    found: list[tuple[Path, Tensor]] = []

    def note(path: Path, value: Tensor) -> Tensor:
        if "logits" not in path and value.ndim == 3:
            own = value.reshape(count, -1, value.shape[-1])
            found.append((path, own[number].detach()))
        elif "logits" not in path and _is_pooled(value, count):
            found.append((path, value[number].detach()))
        return value

    _map_tensors(output, (), note)
    yield from found


def _map_tensors(output: Any, path: Path, change: Any) -> Any:
    """An encoder's answer, a tuple or one of transformers' classes, with other tensors."""
    if isinstance(output, Tensor):
        return change(path, output)
    if isinstance(output, tuple):
        return tuple(_map_tensors(each, (*path, k), change) for k, each in enumerate(output))
    if isinstance(output, Mapping):
        own = {key: _map_tensors(each, (*path, key), change) for key, each in output.items()}
        return type(output)(**own)
    return output


def tokenizer_for(family: Family, key: str) -> Any:
    """The tokenizer of a text encoder; None where there is none."""
    own = family.clip_encoders.get(key, key.replace("text_encoder", "tokenizer"))
    found = [family.components.get(name) for name in (own, "processor")]
    given = next((part for part in found if part is not None), None)
    return getattr(given, "tokenizer", given)  # of a processor

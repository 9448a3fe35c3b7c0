"""DECOR on text encoders: unwanted directions projected out of prompt embeddings (2412.09169).

Forward hooks change the outputs of the encoders. So every prompt that is encoded during a call is
cleaned, for standard pipelines, modular ones and stages, and for pipelines that read the last or
several layers. Every encoder and layer has its own unwanted directions, because their embeddings
lie in different spaces.

The words of a prompt are the tokens between the prefix and the suffix that its token ids have in
common with those of the empty prompt, which covers templates and special tokens of all families.

Only the rows of words are changed. Cleaning the rows after them as well leaves more leaks (36 %
instead of 31 %); fewer directions (rank 1) and directions relative to the mean of the empty prompt
gain nothing on prompts or updates (task "options" in scripts/bench/results/decor.json, by
scripts/bench/decor.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from customize.concepts.tokens.prompt_phrases import mentioned_spans, unmentioned_part
from customize.core.projection import max_strength, principal_directions, project_out
from customize.errors import ConfigError, PipelineError
from customize.families import Family
from customize.pipeline.call_scope import capture_call_scope

# Keys and indices from an encoder's output to one of its tensors.
Path = tuple[str | int, ...]
TokenIds = tuple[int, ...]
# An unwanted phrase, and the indices of its tokens that a prompt contains.
_Words = tuple[str, frozenset[int]]

#: The fraction of its length that the embedding of every word keeps at the automatic strength.
MIN_LENGTH_SHARE = 0.9


@dataclass(frozen=True)
class EncoderCleaning:
    """Settings of the projection of prompt embeddings.

    Attributes:
        phrases: The unwanted phrases.
        negatives: Texts that stay unchanged, such as negative prompts.
        strength: From 0 to 2. None: for every prompt the largest strength up to 1 at which its
            words keep :data:`MIN_LENGTH_SHARE` of their embeddings' length.
        added_tokens: Vocabulary entries of concepts, which do not limit that strength.
    """

    phrases: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    strength: float | None = 1.0
    added_tokens: frozenset[str] = frozenset()


@contextmanager
def clean_text_encoders(family: Family, cleaning: EncoderCleaning) -> Iterator[None]:
    """Project unwanted directions out of every prompt that is encoded inside the context.

    Raises:
        ConfigError: An encoder knows no word of a phrase, or the phrase is too long for it.
        PipelineError: A text encoder is missing, or no prompt was encoded inside the context.
    """
    texts = list(dict.fromkeys(["", *cleaning.phrases, *cleaning.negatives]))
    encoders = {
        key: _CleanedEncoder(family.tokenizer_for(key), cleaning)
        for key in family.all_text_encoders
    }
    with ExitStack() as stack:
        for key, encoder in encoders.items():
            module = family.all_text_encoders[key]
            before = module.register_forward_pre_hook(encoder.before_forward, with_kwargs=True)
            after = module.register_forward_hook(encoder.after_forward, with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        with torch.no_grad():
            family.encode_prompts(texts)
        used = [encoder for encoder in encoders.values() if encoder.learn(texts)]
        yield
    if not any(encoder.has_cleaned for encoder in used):
        raise PipelineError(
            "no prompt was encoded during the call, so nothing was avoided in the image",
            where="avoid",
            fix="give prompt= as text, and no prompt_embeds",
        )


def phrase_too_long(phrase: str, limit: int) -> ConfigError:
    """Build the error for a phrase of more tokens than an encoder reads."""
    return ConfigError(
        f"{phrase!r} is longer than the {limit} tokens that the text encoder reads",
        where="avoid",
        fix="give phrases of a few words, separated by commas",
    )


@dataclass(frozen=True)
class _EncodedText:
    """The token ids of one text in an encoder's input.

    Attributes:
        ids: All token ids, padding included.
        start, stop: The range without padding.
    """

    ids: TokenIds
    start: int
    stop: int

    @property
    def unpadded(self) -> TokenIds:
        return self.ids[self.start : self.stop]


class _CleanedEncoder:
    """The unwanted directions of one text encoder, and the hooks that remove them.

    Until :meth:`learn` the hooks record the outputs; after it they clean them.

    Attributes:
        has_cleaned: Whether a prompt was encoded after :meth:`learn`.
    """

    def __init__(self, tokenizer: Any, cleaning: EncoderCleaning) -> None:
        self.tokenizer, self.cleaning = tokenizer, cleaning
        self.has_cleaned = False
        self._in_this_call = capture_call_scope()
        self._is_recording = True
        self._recorded: list[tuple[_EncodedText, dict[Path, Tensor]]] = []
        self._padding: int | None = None
        self._empty: TokenIds = ()
        self._unchanged: set[TokenIds] = set()
        # phrase -> of each time it was encoded, the range of its words and the hidden states.
        self._phrase_states: dict[str, list[tuple[range, dict[Path, Tensor]]]] = {}
        self._directions: dict[tuple[Path, tuple[_Words, ...]], Tensor] = {}

    def before_forward(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._is_recording and _input_ids(args, kwargs) is not None:
            return args, kwargs | {"output_hidden_states": True}  # pipelines read several of them
        return None

    def after_forward(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        ids = _input_ids(args, kwargs)
        if ids is None or not self._in_this_call():
            return None
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        texts = self._encoded_texts(ids, mask)
        if self._is_recording:
            states: dict[Path, Tensor] = {}

            def record(path: Path, rows: Tensor) -> Tensor:
                states[path] = rows.detach()
                return rows

            _map_hidden_states(output, texts, record)
            for number, text in enumerate(texts):
                self._recorded.append((text, {path: rows[number] for path, rows in states.items()}))
            return None
        groups = self._group_by_phrases(texts)
        self.has_cleaned |= bool(groups)
        return _map_hidden_states(
            output, texts, lambda path, rows: self._clean(path, rows, texts, groups)
        )

    def learn(self, texts: Sequence[str]) -> bool:
        """Take the recorded outputs for those of the texts, and start cleaning.

        Args:
            texts: The texts that were encoded, in this order; the first one is empty.

        Returns:
            Whether this encoder was used.
        """
        self._is_recording = False
        # More than one where tokens have an embedding for each layer.
        passes = len(self._recorded) // len(texts)
        if not passes:
            return False
        self._empty = self._recorded[0][0].unpadded
        for number, text in enumerate(texts):
            recorded = self._recorded[number * passes : (number + 1) * passes]
            if text in self.cleaning.phrases:
                self._check_phrase(text, recorded[0][0])
                self._phrase_states[text] = [
                    (self._word_range(encoded), states) for encoded, states in recorded
                ]
            else:
                self._unchanged |= {encoded.unpadded for encoded, _ in recorded}
        self._recorded = []
        return True

    def _check_phrase(self, phrase: str, encoded: _EncodedText) -> None:
        words = self._word_range(encoded)
        expected = self.tokenizer(phrase, add_special_tokens=False)["input_ids"]
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        visible = [k for k in words if self.tokenizer.decode([encoded.ids[k]]).strip()]
        if all(encoded.ids[k] == unknown for k in visible):
            raise ConfigError(
                f"the text encoder knows no word of {phrase!r}",
                where="avoid",
                fix="use other words",
            )
        # An end-of-text token that is also the padding token does not count as part of the text.
        is_full = encoded.stop - encoded.start >= len(encoded.ids) - 1
        if len(words) < len(expected) and is_full:
            raise phrase_too_long(phrase, len(words))

    def _encoded_texts(self, ids: Tensor, mask: Tensor | None) -> list[_EncodedText]:
        """Split the token ids of a batch into texts, and find their padding."""
        width = ids.shape[-1]
        lines = [tuple(line) for line in ids.reshape(-1, width).tolist()]
        if mask is not None and mask.shape[-1] == width and mask.ndim == ids.ndim:
            texts = []
            for line, visible in zip(lines, mask.reshape(-1, width).tolist(), strict=True):
                positions = [k for k, is_visible in enumerate(visible) if is_visible] or [0, -1]
                texts.append(_EncodedText(line, positions[0], positions[-1] + 1))
            return texts
        if self._padding is None:  # the first text is the empty one, which is mostly padding
            self._padding = lines[0][-1] if lines[0][-2:-1] == lines[0][-1:] else -1
        texts = []
        for line in lines:
            stop = width
            while stop and line[stop - 1] == self._padding:
                stop -= 1
            texts.append(_EncodedText(line, 0, stop))
        return texts

    def _word_range(self, text: _EncodedText) -> range:
        """Return the positions of a text's words, without prefix and suffix of the empty text."""
        ids, empty = text.unpadded, self._empty
        limit = min(len(ids), len(empty))
        prefix = next((k for k in range(limit) if ids[k] != empty[k]), limit)
        limit -= prefix
        suffix = next((k for k in range(limit) if ids[-1 - k] != empty[-1 - k]), limit)
        if 2 * (prefix + suffix) < len(empty):
            raise PipelineError(
                "this pipeline puts the prompt into a template that the family does not know",
                where="avoid",
                fix="use the family's text-to-image pipeline",
            )
        return range(text.start + prefix, text.stop - suffix)

    def _group_by_phrases(
        self, texts: Sequence[_EncodedText]
    ) -> dict[tuple[_Words, ...], dict[int, range]]:
        """Map unwanted words to the texts they are removed from: number -> range of words."""
        groups: dict[tuple[_Words, ...], dict[int, range]] = {}
        decoded: dict[TokenIds, tuple[tuple[_Words, ...], range] | None] = {}
        for number, text in enumerate(texts):
            if text.ids not in decoded:
                decoded[text.ids] = None
                if text.unpadded not in self._unchanged:
                    words = self._word_range(text)
                    prompt = self.tokenizer.decode([text.ids[k] for k in words])
                    if prompt.strip():
                        decoded[text.ids] = self._unmentioned(prompt), words
            entry = decoded[text.ids]
            if entry is not None:
                groups.setdefault(entry[0], {})[number] = entry[1]
        return groups

    def _clean(
        self,
        path: Path,
        rows: Tensor,
        texts: Sequence[_EncodedText],
        groups: Mapping[tuple[_Words, ...], Mapping[int, range]],
    ) -> Tensor:
        """Clean hidden states of shape (texts, length, width)."""
        rows = rows.clone()
        for phrases, ranges in groups.items():
            directions = self._unwanted_directions(path, phrases)
            if not len(directions):
                continue
            strength = rows.new_zeros(len(ranges), rows.shape[1], dtype=torch.float32)
            for line, (number, words) in zip(strength, ranges.items(), strict=True):
                line[words.start : words.stop] = self._strength(
                    rows[number], words, texts[number], directions
                )
            numbers = list(ranges)
            rows[numbers] = project_out(rows[numbers], directions, strength)
        return rows

    def _strength(
        self, states: Tensor, words: range, text: _EncodedText, directions: Tensor
    ) -> float | Tensor:
        if self.cleaning.strength is not None:
            return self.cleaning.strength
        names = self.tokenizer.convert_ids_to_tokens(list(text.ids))
        plain = [k for k in words if names[k] not in self.cleaning.added_tokens]
        return max_strength(states[plain], directions, MIN_LENGTH_SHARE)

    def _unmentioned(self, prompt: str) -> tuple[_Words, ...]:
        """The words of the unwanted phrases that a prompt does not contain."""
        found = []
        for phrase in self.cleaning.phrases:
            if unmentioned_part(phrase, prompt):
                left_out = frozenset(
                    token
                    for start, end in mentioned_spans(phrase, prompt)
                    for token in range(self._count(phrase[:start]), self._count(phrase[:end]))
                )
                found.append((phrase, left_out))
        return tuple(found)

    def _count(self, text: str) -> int:
        """The number of a text's tokens, without special ones."""
        return len(self.tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"])

    def _unwanted_directions(self, path: Path, phrases: tuple[_Words, ...]) -> Tensor:
        """Return orthonormal directions (k, width) that span the phrases' words in one tensor."""
        if (path, phrases) not in self._directions:
            rows = [
                outputs[path][[k for n, k in enumerate(words) if n not in left_out]]
                for phrase, left_out in phrases
                for words, outputs in self._phrase_states[phrase]
            ]
            self._directions[path, phrases] = (
                principal_directions(torch.cat(rows)) if rows else torch.zeros(0, 1)
            )
        return self._directions[path, phrases]


def _input_ids(args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return an encoder's token ids, (batch, length) or (batch, texts, length), if it has any."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    is_ids = isinstance(ids, Tensor) and ids.ndim >= 2 and not ids.is_floating_point()
    return ids if is_ids else None


def _map_hidden_states(
    output: Any,
    texts: Sequence[_EncodedText],
    change: Callable[[Path, Tensor], Tensor],
    path: Path = (),
) -> Any:
    """Apply a function to the hidden states in an encoder's output.

    Args:
        output: A tensor, a tuple, or one of transformers' output classes.
        texts: The texts of the batch.
        change: Called with the path and the states of shape (texts, length, width), also where the
            encoder has several texts in a row; pooled vectors and logits are left out.
        path: Of the output itself.

    Returns:
        The output with the function's results in place of the hidden states.
    """
    if isinstance(output, Tensor):
        tokens = sum(len(text.ids) for text in texts)
        if "logits" in path or output.ndim != 3 or output[..., 0].numel() != tokens:
            return output
        rows = output.reshape(len(texts), -1, output.shape[-1])
        return change(path, rows).reshape(output.shape)
    if isinstance(output, tuple):
        return tuple(
            _map_hidden_states(value, texts, change, (*path, k)) for k, value in enumerate(output)
        )
    if isinstance(output, Mapping):
        values = {
            key: _map_hidden_states(value, texts, change, (*path, key))
            for key, value in output.items()
        }
        return type(output)(**values)
    return output

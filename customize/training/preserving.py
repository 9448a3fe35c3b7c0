"""Class preservation in a run: what is compared, with what of the untouched model, and when.

The losses themselves are in :mod:`customize.core.preservation`. What the untouched model makes of
the class is computed once, before the first step. Phrases are encoded apart from the captions and
without padding: CLIP is causal, so nothing up to the end of a text depends on what fills it up, and
a phrase of ten tokens costs an eighth of a caption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from customize.concepts.inputs import PROMPTS, texts
from customize.concepts.tokens import token_ids
from customize.core.preservation import POOLINGS, PRESERVATIONS, aligned, at, shares
from customize.families import Family
from customize.families.components import TokenDictionary, uncompiled
from customize.training.batches import choose
from customize.training.cache import Conditions, Encode, from_cache
from customize.training.captions import class_caption
from customize.training.config import TEXT_LOSSES, TrainConfig
from customize.training.process import Autocast
from customize.training.trainable import Trainable

# Phrases of each loss that a step looks at, in turns; so that many phrases cost what a few do.
_TOGETHER = 2


@dataclass(frozen=True, eq=False)
class Phrases:
    """What one loss compares of some phrases in one text encoder; a row is a phrase, or, where
    tokens have an embedding for each cross-attention layer, a phrase as one of these reads it.

    Attributes:
        ids: (rows, length), padded, on the encoder's device.
        positions: (rows, n), of the states that are compared; filled up with position 0.
        weight: (rows, n), each position's share of its row; 0 where it is filled up.
        base: (rows, n, width), the states of the untouched encoder for the class.
    """

    ids: Tensor
    positions: Tensor
    weight: Tensor
    base: Tensor

    def rows(self, chosen: Sequence[int]) -> Phrases:
        """Some of the rows, picked by Python numbers: an index tensor would have to cross to the
        device."""
        parts = (self.ids, self.positions, self.weight, self.base)
        return Phrases(*(torch.stack([part[row] for row in chosen]) for part in parts))


@dataclass(frozen=True, eq=False)
class Preserved:
    """What a run preserves.

    Attributes:
        config: the run's.
        phrases: text encoder's component name -> loss -> its phrases.
        encoders: component name -> function from (rows, length) ids to (rows, length, width).
        conditions: caption with the class word -> its conditions in the untouched model.
    """

    config: TrainConfig
    phrases: Mapping[str, Mapping[str, Phrases]]
    encoders: Mapping[str, Callable[[Tensor], Tensor]]
    conditions: Mapping[str, Conditions]

    def text_loss(self, step: int) -> Tensor | None:
        """The weighted losses on text encoders at a step, a scalar; None where there is none."""
        found = []
        for key, losses in self.phrases.items():
            for name, phrases in losses.items():
                # All encoders see the same phrases at a step.
                count = len(phrases.ids)
                size = min(_TOGETHER, count)
                turn = choose(
                    self.config.seed, step, size, count, flip=False, dropout=0.0, stream=name
                )
                these = phrases.rows(turn.pictures)
                ours = at(self.encoders[key](these.ids), these.positions)
                weight, base = these.weight, these.base
                if name == "class_text":
                    ours, base, weight = ours[:, 0], base[:, 0], weight[:, 0]
                loss = PRESERVATIONS[name](ours, base, weight)
                found.append(self.config.preserve[name] / len(self.phrases) * loss)
        return torch.stack(found).sum() if found else None

    def class_captions(self, captions: Sequence[str]) -> list[str]:
        """The concept's captions with the class word."""
        return [
            class_caption(text, self.config.trigger, self.config.class_word) for text in captions
        ]

    def base_conditions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The untouched model's conditions of captions with the class word."""
        return from_cache(self.conditions, captions)


def phrases_of(config: TrainConfig, loss: str) -> list[str]:
    """The phrases that a loss on text encoders compares, with the trigger.

    Those of the settings; else class_text has the one that the concept is trained with, as the
    paper has, and context_text the prompts that layer inputs are recorded with.
    """
    if config.preserve_phrases:
        return texts(config.trigger, config.preserve_phrases)
    if loss == "class_text":
        return texts(config.trigger, [config.caption or "a photo of {}"])
    return texts(config.trigger, PROMPTS)


def texts_of(config: TrainConfig) -> list[str]:
    """All phrases that losses on text encoders compare."""
    return [text for name in text_losses(config) for text in phrases_of(config, name)]


def text_losses(config: TrainConfig) -> list[str]:
    """Those of the settings."""
    return [name for name in TEXT_LOSSES if name in config.preserve]


def captions_of(config: TrainConfig, captions: Sequence[str]) -> list[str]:
    """All captions with the class word that a run encodes besides its own.

    Args:
        captions: the concept's.
    """
    if "output" not in config.preserve:
        return []
    return [class_caption(text, config.trigger, config.class_word) for text in [*captions, ""]]


@torch.no_grad()
def prepare(
    config: TrainConfig,
    family: Family,
    trainable: Trainable,
    captions: Sequence[str],
    encode: Encode,
    autocast: Autocast,
) -> Preserved:
    """Compute what the untouched model makes of the class. The text encoders must be in place.

    Args:
        captions: the concept's.
        encode: knows :func:`captions_of`.
    """
    losses = text_losses(config)
    phrases: dict[str, dict[str, Phrases]] = {}
    encoders = {}
    with trainable.adapter.silent(), autocast():
        told = captions_of(config, captions)
        conditions = {
            text: {k: v.clone() for k, v in encode([text]).items()} for text in dict.fromkeys(told)
        }
        for dictionary in family.token_dictionaries() if losses else ():
            key = dictionary.key
            own = token_ids(dictionary, trainable.rows[key].names) if key in trainable.rows else []
            encoders[key] = _encoder(dictionary, own, config.preserve_pooling)
            phrases[key] = {
                name: _prepared(config, name, dictionary, trainable, encoders[key])
                for name in losses
            }
    return Preserved(config, phrases, encoders, conditions)


def _prepared(
    config: TrainConfig,
    loss: str,
    dictionary: TokenDictionary,
    trainable: Trainable,
    encoder: Callable[[Tensor], Tensor],
) -> Phrases:
    tokenizer: Any = dictionary.tokenizer
    device = next(dictionary.text_encoder.parameters()).device
    end = tokenizer.eos_token_id

    def ids_of(text: str) -> list[int]:
        length = tokenizer.model_max_length
        ids: list[int] = tokenizer(text, truncation=True, max_length=length).input_ids
        return ids

    def positions_of(ours: list[int], base: list[int]) -> tuple[list[int], list[int]]:
        if loss == "context_text":
            return aligned(ours, base)
        pool = POOLINGS[config.preserve_pooling]
        return [pool(ours, end)], [pool(base, end)]

    own_ids, own_positions, base = [], [], []
    for phrase in phrases_of(config, loss):
        class_ids = ids_of(class_caption(phrase, config.trigger, config.class_word))
        states = encoder(torch.tensor([class_ids], device=device))[0]
        for text in trainable.wordings(phrase) or [trainable.expanded(phrase)]:
            own_ids.append(ids_of(text))
            ours, theirs = positions_of(own_ids[-1], class_ids)
            own_positions.append(ours)
            base.append(states[theirs].float())
    longest = max(map(len, own_positions))
    counts = [[place < len(own) for place in range(longest)] for own in own_positions]
    return Phrases(
        ids=_filled(own_ids, end).to(device),
        positions=_filled(own_positions, 0).to(device),
        weight=shares(torch.tensor(counts)).to(device),
        base=nn.utils.rnn.pad_sequence(base, batch_first=True),
    )


def _filled(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def _encoder(
    dictionary: TokenDictionary, own: Sequence[int], pooling: str
) -> Callable[[Tensor], Tensor]:
    """The text encoder's states after its last norm.

    With the published pooling, the concept's tokens have no position in it, as in the published
    code, which lays their rows over the sum of rows and positions.
    """
    encoder: Any = dictionary.text_encoder

    def encode(ids: Tensor) -> Tensor:
        if pooling == "published" and own:
            with _without_positions(encoder, ids, own):
                states: Tensor = encoder(ids).last_hidden_state
        else:
            states = encoder(ids).last_hidden_state
        return states

    return encode


@contextmanager
def _without_positions(encoder: Any, ids: Tensor, own: Sequence[int]) -> Iterator[None]:
    """Within it, tokens of these ids have no position embedding."""
    modules = uncompiled(encoder).modules()
    embeddings = next(module for module in modules if hasattr(module, "position_embedding"))
    concept = ((ids >= min(own)) & (ids <= max(own)))[..., None]

    def taken_out(module: Any, args: Any, output: Tensor) -> Tensor:
        positions = module.position_embedding.weight[: ids.shape[1]].to(output)
        return output - concept * positions

    handle = embeddings.register_forward_hook(taken_out)
    try:
        yield
    finally:
        handle.remove()

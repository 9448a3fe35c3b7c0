"""Class preservation in a run: what is compared, with what of the untouched model, and when.

The losses themselves are in :mod:`customize.core.preservation`. What the untouched model makes of
the class is computed once, before the first step. Phrases are encoded without padding: CLIP is
causal, so nothing up to the end of a text depends on what fills it up, and a phrase of ten tokens
costs an eighth of a caption.

Preserving is done every sixth step, with six times the weight: the same on average, at a sixth of
the cost, which for texts is mostly that of calling an encoder at all, and for the denoiser's
answers that of a second batch forward and backward, and a third forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
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
from customize.training.config import TrainConfig
from customize.training.process import Autocast
from customize.training.trainable import Trainable

#: Steps from one that preserves to the next.
EVERY = 6
# Phrases of each loss that such a step looks at, in turns: many phrases cost what a few do.
_TOGETHER = 2


Encoder = Callable[[Tensor, int], Tensor]


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
        encoders: component name -> function from (rows, length) ids, and how many of the first are
            class_text's, to (rows, length, width).
        conditions: caption with the class word -> its conditions in the untouched model.
    """

    config: TrainConfig
    phrases: Mapping[str, Mapping[str, Phrases]]
    encoders: Mapping[str, Encoder]
    conditions: Mapping[str, Conditions]

    def text_loss(self, step: int) -> Tensor | None:
        """The weighted losses on text encoders at a step, from 0: a scalar, or None where the step
        looks at no phrases."""
        if not (preserves(step) and self.phrases):
            return None
        found = []
        for key, losses in self.phrases.items():
            # All encoders see the same phrases at a step.
            looked = {
                name: phrases.rows(self._chosen(name, step // EVERY))
                for name, phrases in losses.items()
            }
            sizes = [len(each.ids) for each in looked.values()]
            published = len(looked["class_text"].ids) if "class_text" in looked else 0
            states = self.encoders[key](
                torch.cat([each.ids for each in looked.values()]), published
            )
            for (name, these), own in zip(looked.items(), states.split(sizes), strict=True):
                ours, base, weight = at(own, these.positions), these.base, these.weight
                if name == "class_text":
                    ours, base, weight = ours[:, 0], base[:, 0], weight[:, 0]
                loss = PRESERVATIONS[name](ours, base, weight)
                found.append(self.config.preserve[name] * loss)
        return EVERY / len(self.phrases) * torch.stack(found).sum()

    def _chosen(self, name: str, turn: int) -> list[int]:
        """Which rows of a loss's phrases come at a turn; each once before any comes again."""
        count = len(next(iter(self.phrases.values()))[name].ids)
        size, seed = min(_TOGETHER, count), self.config.seed
        return choose(seed, turn, size, count, flip=False, dropout=0.0, stream=name).pictures

    def class_captions(self, captions: Sequence[str]) -> list[str]:
        """The concept's captions with the class word."""
        return [
            class_caption(text, self.config.trigger, self.config.class_word) for text in captions
        ]

    def base_conditions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The untouched model's conditions of captions with the class word."""
        return from_cache(self.conditions, captions)


def preserves(step: int) -> bool:
    """Whether a step, from 0, has the losses of preservation."""
    return step % EVERY == 0


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
    return [text for name in config.text_losses for text in phrases_of(config, name)]


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
    losses = config.text_losses
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
            without = own if config.preserve_pooling == "published" else []
            encoders[key] = partial(_encoded, dictionary.text_encoder, without)
            phrases[key] = _prepared(config, losses, dictionary, trainable, encoders[key])
    return Preserved(config, phrases, encoders, conditions)


def _prepared(
    config: TrainConfig,
    losses: Sequence[str],
    dictionary: TokenDictionary,
    trainable: Trainable,
    encoder: Encoder,
) -> dict[str, Phrases]:
    tokenizer: Any = dictionary.tokenizer
    device = next(dictionary.text_encoder.parameters()).device
    end, pool = tokenizer.eos_token_id, POOLINGS[config.preserve_pooling]

    def ids_of(text: str) -> list[int]:
        length = tokenizer.model_max_length
        ids: list[int] = tokenizer(text, truncation=True, max_length=length).input_ids
        return ids

    found: dict[str, tuple[list[list[int]], list[list[int]], list[Tensor]]] = {}
    for loss in losses:
        own_ids, own_positions, base = found.setdefault(loss, ([], [], []))
        for phrase in phrases_of(config, loss):
            class_ids = ids_of(class_caption(phrase, config.trigger, config.class_word))
            states = encoder(torch.tensor([class_ids], device=device), 0)[0]
            for text in trainable.wordings(phrase) or [trainable.expanded(phrase)]:
                ids = ids_of(text)
                if loss == "class_text":
                    ours, theirs = [pool(ids, end)], [pool(class_ids, end)]
                else:
                    ours, theirs = aligned(ids, class_ids)
                own_ids.append(ids)
                own_positions.append(ours)
                base.append(states[theirs].float())
    # They go through the encoder together.
    longest = max(len(ids) for rows, _, _ in found.values() for ids in rows)
    return {
        loss: Phrases(
            ids=_filled(own_ids, end, longest).to(device),
            positions=_filled(positions, 0).to(device),
            weight=shares(_filled([[1] * len(own) for own in positions], 0)).to(device),
            base=nn.utils.rnn.pad_sequence(base, batch_first=True),
        )
        for loss, (own_ids, positions, base) in found.items()
    }


def _filled(rows: Sequence[Sequence[int]], value: int, length: int | None = None) -> Tensor:
    longest = max(map(len, rows)) if length is None else length
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def _encoded(model: nn.Module, without: Sequence[int], ids: Tensor, first: int) -> Tensor:
    """A text encoder's states after its last norm: (rows, length, width).

    Args:
        without: ids of tokens that have no position in the ``first`` rows: in ClassDiffusion's
            published code the concept's row is laid over the sum of row and position.
    """
    with _without_positions(model, ids, first, without) if without and first else nullcontext():
        states: Tensor = model(ids).last_hidden_state
    return states


@contextmanager
def _without_positions(
    encoder: Any, ids: Tensor, first: int, without: Sequence[int]
) -> Iterator[None]:
    modules = uncompiled(encoder).modules()
    embeddings = next(module for module in modules if hasattr(module, "position_embedding"))
    taken = (ids >= min(without)) & (ids <= max(without))
    taken[first:] = False

    def take_out(module: Any, args: Any, output: Tensor) -> Tensor:
        positions = module.position_embedding.weight[: ids.shape[1]].to(output)
        return output - taken[..., None] * positions

    handle = embeddings.register_forward_hook(take_out)
    try:
        yield
    finally:
        handle.remove()

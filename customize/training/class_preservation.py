"""Class preservation in a run: what is compared, with what of the untouched model, and when.

The losses themselves are in :mod:`customize.core.preservation`. What the untouched model makes of
the class is computed once, before the first step. Phrases are encoded without padding: CLIP is
causal, so nothing up to the end of a text depends on what fills it up, and a phrase of ten tokens
costs an eighth of a caption.

Preserving is done every sixth step, with six times the weight: the same on average, at a sixth of
the cost, which for texts is mostly that of calling an encoder at all, and for the denoiser's
answers that of a second batch forward and backward, and one or two more forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from customize.concepts.input_statistics import CONTEXTS, PROMPTS, fill_prompts
from customize.core.preservation import PRESERVATIONS
from customize.core.preservation.positions import (
    POOLINGS,
    common_positions,
    gather_positions,
    normalize_rows,
)
from customize.families import Family
from customize.families.pipeline_components import TokenDictionary, uncompiled
from customize.training.config import TrainConfig
from customize.training.data.batches import choose_images
from customize.training.data.captions import replace_trigger
from customize.training.distributed import Autocast
from customize.training.latents_and_embeddings import Conditions, Encode, lookup_conditions
from customize.training.trainable import Trainable

#: Steps from one that preserves to the next.
PRESERVATION_INTERVAL = 6
# Phrases of each loss that such a step looks at, in turns: many phrases cost what a few do.
_TOGETHER = 2


Encoder = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class PhraseBatch:
    """What one loss compares of some phrases in one text encoder; a row is a phrase, or, where
    tokens have an embedding for each cross-attention layer, a phrase as one of these reads it.

    Attributes:
        ids: (rows, length), padded, on the encoder's device.
        positions: (rows, n), of the states that are compared; filled up with position 0.
        weight: (rows, n), each position's share of its row; 0 where it is filled up.
        base: (rows, n, width), the states of the untouched encoder for the class.
        counts: rows of each concept, which follow one another.
    """

    ids: Tensor
    positions: Tensor
    weight: Tensor
    base: Tensor
    counts: Sequence[int]

    def select_phrases(self, turn: int, seed: int, stream: str) -> PhraseBatch:
        """The rows that come at a turn: of each concept as many, each once before any again.

        They are picked by Python numbers: an index tensor would have to cross to the device.
        """
        size, chosen = min(_TOGETHER, max(self.counts)), []
        for concept, count in enumerate(self.counts):
            own = choose_images(
                seed, turn, size, count, flip=False, dropout=0.0, stream=stream
            ).pictures
            chosen += [sum(self.counts[:concept]) + number for number in own]
        parts = (self.ids, self.positions, self.weight, self.base)
        picked = [torch.stack([part[row] for row in chosen]) for part in parts]
        ids, positions, weight, base = picked
        return PhraseBatch(ids, positions, weight, base, [size] * len(self.counts))


@dataclass(frozen=True, eq=False)
class PreservationTargets:
    """What a run preserves.

    Attributes:
        configs: of the run's concepts.
        contexts: each concept's prompts of it in a context; none where context_output is off.
        phrases: text encoder's component name -> loss -> its phrases.
        encoders: component name -> function from (rows, length) ids, and how many of the first are
            class_text's, to (rows, length, width).
        conditions: caption with the class word -> its conditions in the untouched model.
    """

    configs: Sequence[TrainConfig]
    contexts: Sequence[Sequence[str]]
    phrases: Mapping[str, Mapping[str, PhraseBatch]]
    encoders: Mapping[str, Encoder]
    conditions: Mapping[str, Conditions]

    def text_loss(self, step: int) -> Tensor | None:
        """The weighted losses on text encoders at a step, from 0: a scalar, or None where the step
        looks at no phrases."""
        if not (is_preservation_step(step) and self.phrases):
            return None
        found, config = [], self.configs[0]
        for key, losses in self.phrases.items():
            # All encoders see the same phrases at a step.
            looked = {
                name: phrases.select_phrases(step // PRESERVATION_INTERVAL, config.seed, name)
                for name, phrases in losses.items()
            }
            sizes = [len(each.ids) for each in looked.values()]
            published = len(looked["class_text"].ids) if "class_text" in looked else 0
            states = self.encoders[key](
                torch.cat([each.ids for each in looked.values()]), published
            )
            for (name, these), own in zip(looked.items(), states.split(sizes), strict=True):
                ours, base, weight = (
                    gather_positions(own, these.positions),
                    these.base,
                    these.weight,
                )
                if name == "class_text":
                    ours, base, weight = ours[:, 0], base[:, 0], weight[:, 0]
                loss = PRESERVATIONS[name](ours, base, weight)
                found.append(config.preserve[name] * loss)
        return PRESERVATION_INTERVAL / len(self.phrases) * torch.stack(found).sum()

    def choose_context_prompts(self, concepts: Sequence[int], turn: int) -> list[str]:
        """A prompt in a context for each of these concepts, by number. Of a batch that is whole
        and of one concept, each comes once before any comes again.

        Args:
            turn: counts the batches of the steps that preserve, from the start of the run.
        """
        seed, count = self.configs[0].seed, len(concepts)
        found = []
        for place, concept in enumerate(concepts):
            fill_prompts, position = self.contexts[concept], turn * count + place
            own = choose_images(
                seed, position, 1, len(fill_prompts), flip=False, dropout=0.0, stream="contexts"
            )
            found.append(fill_prompts[own.pictures[0]])
        return found

    def class_captions(self, captions: Sequence[str]) -> list[str]:
        """The concepts' captions with class words."""
        return [with_class_words(self.configs, text) for text in captions]

    def base_conditions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The untouched model's conditions of captions with the class word."""
        return lookup_conditions(self.conditions, captions)


def is_preservation_step(step: int) -> bool:
    """Whether a step, from 0, has the losses of preservation."""
    return step % PRESERVATION_INTERVAL == 0


def phrases_for_loss(config: TrainConfig, loss: str) -> list[str]:
    """The phrases that a loss compares, with the trigger.

    Those of the settings; else class_text has the one that the concept is trained with, as the
    paper has, context_text the prompts that layer inputs are recorded with, and context_output the
    caption with what these say besides.
    """
    caption = config.caption or "a photo of {}"
    if config.preserve_phrases:
        return fill_prompts(config.trigger, config.preserve_phrases)
    if loss == "class_text":
        return fill_prompts(config.trigger, [caption])
    if loss == "context_text":
        return fill_prompts(config.trigger, PROMPTS)
    return fill_prompts(config.trigger, [f"{caption} {context}" for context in CONTEXTS])


def preserved_phrases(config: TrainConfig) -> list[str]:
    """All phrases that are compared, of losses on text encoders and of contexts."""
    return [
        text
        for name in config.preserve
        if name != "output"
        for text in phrases_for_loss(config, name)
    ]


def with_class_words(configs: Sequence[TrainConfig], text: str) -> str:
    """A text with each concept's class word in its trigger's place: the untouched model knows none
    of the triggers, so none may be in what it is asked."""
    for config in configs:
        text = replace_trigger(text, config.trigger, config.class_word)
    return text


def base_captions(configs: Sequence[TrainConfig], captions: Sequence[str]) -> list[str]:
    """All captions with class words that a run encodes besides its own.

    Args:
        captions: the concepts'.
    """
    preserve = configs[0].preserve
    if not preserve.keys() & {"output", "context_output"}:
        return []
    there = [text for own in context_prompts(configs) for text in own]
    return [with_class_words(configs, text) for text in [*captions, *there, ""]]


def context_prompts(configs: Sequence[TrainConfig]) -> list[list[str]]:
    """Each concept's prompts of it in a context; none where context_output is off."""
    on = "context_output" in configs[0].preserve
    return [phrases_for_loss(config, "context_output") if on else [] for config in configs]


@torch.no_grad()
def compute_preservation_targets(
    configs: Sequence[TrainConfig],
    family: Family,
    trainable: Trainable,
    captions: Sequence[str],
    encode: Encode,
    autocast: Autocast,
) -> PreservationTargets:
    """Compute what the untouched model makes of the classes. The text encoders must be in place.

    Args:
        configs: of the concepts; what is preserved, and how, is the same in all.
        captions: the concepts'.
        encode: knows :func:`base_captions`.
    """
    losses = configs[0].text_losses
    phrases: dict[str, dict[str, PhraseBatch]] = {}
    encoders = {}
    with trainable.adapters_disabled(), autocast():
        told = base_captions(configs, captions)
        conditions = {
            text: {k: v.clone() for k, v in encode([text]).items()} for text in dict.fromkeys(told)
        }
        for dictionary in family.token_dictionaries() if losses else ():
            key = dictionary.key
            published = configs[0].preserve_pooling == "published"
            without = trainable.trained_token_ids(dictionary) if published else []
            encoders[key] = partial(_encoded, dictionary.text_encoder, without)
            phrases[key] = _prepared(configs, losses, dictionary, trainable, encoders[key])
    return PreservationTargets(configs, context_prompts(configs), phrases, encoders, conditions)


def _prepared(
    configs: Sequence[TrainConfig],
    losses: Sequence[str],
    dictionary: TokenDictionary,
    trainable: Trainable,
    encoder: Encoder,
) -> dict[str, PhraseBatch]:
    tokenizer: Any = dictionary.tokenizer
    device = next(dictionary.text_encoder.parameters()).device
    end, pool = tokenizer.eos_token_id, POOLINGS[configs[0].preserve_pooling]

    def ids_of(text: str) -> list[int]:
        length = tokenizer.model_max_length
        ids: list[int] = tokenizer(text, truncation=True, max_length=length).input_ids
        return ids

    found: dict[str, tuple[list[list[int]], list[list[int]], list[Tensor], list[int]]] = {}
    for loss, config in product(losses, configs):
        own_ids, own_positions, base, counts = found.setdefault(loss, ([], [], [], []))
        before = len(own_ids)
        for phrase in phrases_for_loss(config, loss):
            class_ids = ids_of(with_class_words(configs, phrase))
            states = encoder(torch.tensor([class_ids], device=device), 0)[0]
            for text in trainable.layer_prompts(phrase) or [trainable.expand_triggers(phrase)]:
                ids = ids_of(text)
                if loss == "class_text":
                    ours, theirs = [pool(ids, end)], [pool(class_ids, end)]
                else:
                    ours, theirs = common_positions(ids, class_ids)
                own_ids.append(ids)
                own_positions.append(ours)
                base.append(states[theirs].float())
        counts.append(len(own_ids) - before)
    # They go through the encoder together.
    longest = max(len(ids) for rows, _, _, _ in found.values() for ids in rows)
    return {
        loss: PhraseBatch(
            ids=_filled(own_ids, end, longest).to(device),
            positions=_filled(positions, 0).to(device),
            weight=normalize_rows(_filled([[1] * len(own) for own in positions], 0)).to(device),
            base=nn.utils.rnn.pad_sequence(base, batch_first=True),
            counts=counts,
        )
        for loss, (own_ids, positions, base, counts) in found.items()
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

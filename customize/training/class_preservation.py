"""Class preservation: the base model's outputs for the class, and the losses on text encoders.

The loss functions are in :mod:`customize.core.preservation`. The base model's outputs for the class
are computed once, before the first step. Phrases are encoded without padding: CLIP is causal, so
the states up to the end of a text do not depend on its padding, and a phrase of ten tokens costs an
eighth of a padded caption.

The losses are computed at every sixth step with six times the weight, which is the same on average
at a sixth of the cost. For texts, the cost is mostly that of each call of an encoder; for the
denoiser, it is a second batch in the forward and backward pass and one or two forward passes more.
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

from customize.concepts.caption_template import DEFAULT_CAPTION
from customize.concepts.input_statistics import CONTEXTS, PROMPTS, fill_prompts
from customize.core.preservation import PRESERVATIONS, select_losses
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
from customize.training.latents_and_embeddings import Conditions, Encode
from customize.training.trainable import Trainable

#: Steps between two computations of the preservation losses.
PRESERVATION_INTERVAL = 6
# Phrases of each loss per computation; many phrases in turns cost as much as few.
_PHRASES_PER_STEP = 2

#: Computes (rows, length, width) states from (rows, length) ids and the number of leading rows that
#: belong to losses that compare the feature of a phrase.
TextStates = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class PhraseBatch:
    """The phrases that one loss compares in one text encoder.

    A row is a phrase, or the wording of a phrase for one cross-attention layer where tokens have an
    embedding for each layer.

    Attributes:
        ids: Token ids, int64 (rows, length), padded, on the encoder's device.
        positions: Positions of the compared states, int64 (rows, n), padded with 0.
        weight: Weight of each position in its row, float32 (rows, n); 0 for padding.
        base: States of the base encoder for the class, float32 (rows, n, width).
        counts: Number of rows of each concept; rows are sorted by concept.
    """

    ids: Tensor
    positions: Tensor
    weight: Tensor
    base: Tensor
    counts: Sequence[int]

    def select(self, turn: int, seed: int, stream: str) -> PhraseBatch:
        """Select the rows of one turn, equally many of each concept.

        Each row occurs once before any occurs again.

        Args:
            turn: Number of the computation, from 0.
            seed: Seed of the run.
            stream: Name of the random stream.
        """
        size = min(_PHRASES_PER_STEP, max(self.counts))
        rows: list[int] = []
        for concept, count in enumerate(self.counts):
            choice = choose_images(seed, turn, size, count, flip=False, dropout=0.0, stream=stream)
            rows += [sum(self.counts[:concept]) + number for number in choice.indices]
        # Indexed by Python numbers, because an index tensor would be copied to the device.
        ids, positions, weight, base = (
            torch.stack([tensor[row] for row in rows])
            for tensor in (self.ids, self.positions, self.weight, self.base)
        )
        return PhraseBatch(ids, positions, weight, base, [size] * len(self.counts))


@dataclass(frozen=True, eq=False)
class PreservationTargets:
    """The base model's outputs that the preservation losses of a run compare with.

    Attributes:
        configs: Settings of the run's concepts.
        contexts: Prompts in contexts of each concept; empty without a loss that compares them.
        phrases: Text encoder's component name -> loss -> its phrases.
        text_states: Text encoder's component name -> its forward function.
        conditions: Caption with the class word -> its conditions in the base model.
    """

    configs: Sequence[TrainConfig]
    contexts: Sequence[Sequence[str]]
    phrases: Mapping[str, Mapping[str, PhraseBatch]]
    text_states: Mapping[str, TextStates]
    conditions: Mapping[str, Conditions]

    def text_loss(self, step: int) -> Tensor | None:
        """Compute the weighted losses on the text encoders.

        Args:
            step: Optimizer steps done before.

        Returns:
            A scalar, float32; None at steps without a preservation loss on texts.
        """
        if step % PRESERVATION_INTERVAL or not self.phrases:
            return None
        weighted, config = [], self.configs[0]
        for key, losses in self.phrases.items():
            # All encoders compare the same phrases at a step.
            selected = {
                loss: phrases.select(step // PRESERVATION_INTERVAL, config.seed, loss)
                for loss, phrases in losses.items()
            }
            sizes = [len(phrases.ids) for phrases in selected.values()]
            ids = torch.cat([phrases.ids for phrases in selected.values()])
            # The losses on phrases come first.
            first = select_losses(selected, "phrase_feature")
            states = self.text_states[key](ids, sum(len(selected[loss].ids) for loss in first))
            for (loss, phrases), rows in zip(selected.items(), states.split(sizes), strict=True):
                learned, base, weight = (
                    gather_positions(rows, phrases.positions),
                    phrases.base,
                    phrases.weight,
                )
                if loss in first:
                    learned, base, weight = learned[:, 0], base[:, 0], weight[:, 0]
                weighted.append(config.preserve[loss] * PRESERVATIONS[loss](learned, base, weight))
        return PRESERVATION_INTERVAL / len(self.phrases) * torch.stack(weighted).sum()

    def choose_context_prompts(self, concepts: Sequence[int], turn: int) -> list[str]:
        """Choose a prompt in a context for each image of a batch.

        In whole batches of one concept, each prompt occurs once before any occurs again.

        Args:
            concepts: Number of each image's concept.
            turn: Number of the batch, counted over the steps with preservation losses.
        """
        seed, prompts = self.configs[0].seed, []
        for image, concept in enumerate(concepts):
            contexts, number = self.contexts[concept], turn * len(concepts) + image
            choice = choose_images(
                seed, number, 1, len(contexts), flip=False, dropout=0.0, stream="contexts"
            )
            prompts.append(contexts[choice.indices[0]])
        return prompts


def phrases_for_loss(config: TrainConfig, loss: str) -> list[str]:
    """Return the phrases with the trigger that a loss compares.

    The setting ``preserve_phrases`` takes precedence. By default, losses on phrases compare the
    caption, as in the ClassDiffusion paper; those on the words around the concept the prompts of
    the layer input recording; and those on contexts the caption extended by the contexts of these
    prompts.
    """
    compares = PRESERVATIONS[loss].compares
    caption = config.caption or DEFAULT_CAPTION
    if config.preserve_phrases:
        return fill_prompts(config.trigger, config.preserve_phrases)
    if compares == "phrase_feature":
        return fill_prompts(config.trigger, [caption])
    if compares == "context_features":
        return fill_prompts(config.trigger, PROMPTS)
    return fill_prompts(config.trigger, [f"{caption} {context}" for context in CONTEXTS])


def with_class_words(configs: Sequence[TrainConfig], text: str) -> str:
    """Replace each concept's trigger by its class word, because the base knows no trigger."""
    for config in configs:
        text = replace_trigger(text, config.trigger, config.class_word)
    return text


def context_prompts(configs: Sequence[TrainConfig]) -> list[list[str]]:
    """Return the prompts in contexts of each concept; empty without a loss that compares them."""
    losses = select_losses(configs[0].preserve, "context_change")
    return [phrases_for_loss(config, losses[0]) if losses else [] for config in configs]


def base_captions(configs: Sequence[TrainConfig], captions: Sequence[str]) -> list[str]:
    """Return the captions with class words that the base model's outputs are computed for.

    Args:
        configs: Settings of the run's concepts.
        captions: Captions of the concepts' images.
    """
    if not select_losses(configs[0].preserve, "class_prediction", "context_change"):
        return []
    contexts = [text for prompts in context_prompts(configs) for text in prompts]
    return [with_class_words(configs, text) for text in [*captions, *contexts, ""]]


@torch.no_grad()
def compute_preservation_targets(
    configs: Sequence[TrainConfig],
    family: Family,
    trainable: Trainable,
    encode: Encode,
    captions: Sequence[str],
) -> PreservationTargets:
    """Compute the base model's outputs for the classes, with adapters disabled.

    The text encoders must be on the device, and autocast must be active.

    Args:
        configs: Settings of the run's concepts; ``preserve`` is equal in all.
        family: The base model.
        trainable: The attached adapters and tokens.
        encode: Returns the conditions of captions, including those of :func:`base_captions`.
        captions: Captions of the concepts' images.
    """
    losses = configs[0].text_losses
    phrases: dict[str, dict[str, PhraseBatch]] = {}
    text_states: dict[str, TextStates] = {}
    with trainable.adapters_disabled():
        conditions = {
            text: {key: values.clone() for key, values in encode([text]).items()}
            for text in dict.fromkeys(base_captions(configs, captions))
        }
        for dictionary in family.token_dictionaries() if losses else ():
            key = dictionary.key
            is_published = configs[0].preserve_pooling == "published"
            token_ids = trainable.trained_token_ids(dictionary) if is_published else []
            text_states[key] = partial(_compute_text_states, dictionary.text_encoder, token_ids)
            phrases[key] = _prepare_phrases(
                configs, losses, dictionary, trainable, text_states[key]
            )
    return PreservationTargets(configs, context_prompts(configs), phrases, text_states, conditions)


def _prepare_phrases(
    configs: Sequence[TrainConfig],
    losses: Sequence[str],
    dictionary: TokenDictionary,
    trainable: Trainable,
    text_states: TextStates,
) -> dict[str, PhraseBatch]:
    tokenizer: Any = dictionary.tokenizer
    device = next(dictionary.text_encoder.parameters()).device
    end, pool = tokenizer.eos_token_id, POOLINGS[configs[0].preserve_pooling]

    def tokenize(text: str) -> list[int]:
        length = tokenizer.model_max_length
        ids: list[int] = tokenizer(text, truncation=True, max_length=length).input_ids
        return ids

    # Loss -> token ids, compared positions and base states of each row, and rows of each concept.
    rows: dict[str, tuple[list[list[int]], list[list[int]], list[Tensor], list[int]]] = {}
    for loss, config in product(losses, configs):
        all_ids, all_positions, base, counts = rows.setdefault(loss, ([], [], [], []))
        first = len(all_ids)
        for phrase in phrases_for_loss(config, loss):
            class_ids = tokenize(with_class_words(configs, phrase))
            states = text_states(torch.tensor([class_ids], device=device), 0)[0]
            for text in trainable.layer_prompts(phrase) or [trainable.expand_triggers(phrase)]:
                ids = tokenize(text)
                if PRESERVATIONS[loss].compares == "phrase_feature":
                    positions, class_positions = [pool(ids, end)], [pool(class_ids, end)]
                else:
                    positions, class_positions = common_positions(ids, class_ids)
                all_ids.append(ids)
                all_positions.append(positions)
                base.append(states[class_positions].float())
        counts.append(len(all_ids) - first)
    # Padded to one length, because all losses go through the encoder in one batch.
    longest = max(len(ids) for all_ids, _, _, _ in rows.values() for ids in all_ids)
    return {
        loss: PhraseBatch(
            ids=_pad(all_ids, end, longest).to(device),
            positions=_pad(all_positions, 0).to(device),
            weight=normalize_rows(_pad([[1] * len(row) for row in all_positions], 0)).to(device),
            base=nn.utils.rnn.pad_sequence(base, batch_first=True),
            counts=counts,
        )
        for loss, (all_ids, all_positions, base, counts) in rows.items()
    }


def _pad(rows: Sequence[Sequence[int]], value: int, length: int | None = None) -> Tensor:
    longest = max(map(len, rows)) if length is None else length
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def _compute_text_states(
    model: nn.Module, token_ids: Sequence[int], ids: Tensor, class_rows: int
) -> Tensor:
    """Compute a text encoder's states after its last norm, (rows, length, width).

    Args:
        model: The text encoder.
        token_ids: Tokens without a position embedding in the first ``class_rows`` rows: the
            published code of ClassDiffusion replaces the sum of token and position embedding by the
            concept's embedding. Empty: all tokens have one.
        ids: Token ids, int64 (rows, length).
        class_rows: Number of leading rows of losses that compare the feature of a phrase.
    """
    is_published = bool(token_ids) and class_rows > 0
    with _without_positions(model, ids[:class_rows], token_ids) if is_published else nullcontext():
        states: Tensor = model(ids).last_hidden_state
    return states


@contextmanager
def _without_positions(encoder: Any, class_ids: Tensor, token_ids: Sequence[int]) -> Iterator[None]:
    modules = uncompiled(encoder).modules()
    embeddings = next(module for module in modules if hasattr(module, "position_embedding"))
    is_token = (class_ids >= min(token_ids)) & (class_ids <= max(token_ids))

    def subtract_positions(module: Any, arguments: Any, output: Tensor) -> Tensor:
        mask = torch.zeros(output.shape[:2], dtype=torch.bool, device=output.device)
        mask[: len(is_token)] = is_token
        positions = module.position_embedding.weight[: output.shape[1]].to(output)
        return output - mask[..., None] * positions

    handle = embeddings.register_forward_hook(subtract_positions)
    try:
        yield
    finally:
        handle.remove()

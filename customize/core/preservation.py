"""Class preservation: losses that keep a model from forgetting a concept's class.

A few training images show a dog in two places without any accessory; the model then forgets that
dogs can wear hats. A *preservation* compares an output of the trained model for prompts with the
concept with the output of the base model for prompts with its class, and returns a scalar loss::

    preservation(ours, base, weight) = mean_i  sum_j  weight_ij  distance(ours_ij, base_ij)

over samples i and, for texts, positions j. ``base`` needs no gradient. Distances are computed in
float32 from inputs of any floating dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from customize.core.objectives import weighted_mse
from customize.core.precision import full_precision
from customize.errors import TrainingError

Preservation = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@full_precision()
def class_text(ours: Tensor, base: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the semantic preservation loss of ClassDiffusion (2405.17532), a cosine distance.

    Args:
        ours: (phrases, width), the text encoder's features of phrases with the concept.
        base: The same shape, features of the phrases with the class.
        weight: (phrases,), factors; None for 1.

    Returns:
        A scalar, float32; between 0 and 2 without weights.

    Raises:
        TrainingError: The shapes do not match.
    """
    _check_shapes(ours, base, weight, 1)
    distance = cosine_distance(ours, base)
    return (distance if weight is None else distance * weight.float()).mean()


@full_precision()
def context_text(ours: Tensor, base: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return CoRe's context loss (AAAI 2025, arXiv 2408.15914), a cosine distance.

    Args:
        ours: (prompts, positions, width), the text encoder's states of the context, which are all
            words but the concept's, in prompts with the concept.
        base: The same shape, states of the same words in prompts with the class.
        weight: (prompts, positions), the weight of each position in its prompt, as from
            :func:`normalize_rows`; None for equal weights.

    Returns:
        A scalar, float32; between 0 and 2 for normalized weights.

    Raises:
        TrainingError: The shapes do not match.
    """
    _check_shapes(ours, base, weight, 2)
    distance = cosine_distance(ours, base)
    if weight is None:
        return distance.mean()
    return (distance * weight.float()).sum(1).mean()


@full_precision()
def output(ours: Tensor, base: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean squared change of the denoiser's prediction for prompts with the class.

    Args:
        ours: (batch, channels, *space), predicted with the adapter.
        base: The same shape, predicted without it for the same latents, noise levels and prompts.
        weight: (batch,), such as the weight of the main loss; None for 1.

    Returns:
        A scalar, float32, >= 0.

    Raises:
        TrainingError: The shapes do not match.
    """
    return weighted_mse(ours, base, weight).mean()


def context_output(ours: Tensor, base: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean squared change of a context's effect on the denoiser's prediction (ours).

    In "a <rex> wearing a hat" training does not forget how a hat looks, but what these words do
    beside the concept's token. So the effect of the context is preserved, and the concept itself is
    not constrained.

    Args:
        ours: (batch, channels, *space), the prediction for prompts with the concept in a context
            minus that for prompts without the context.
        base: The same difference for the class, predicted without the adapter for the same latents
            and noise levels.
        weight: (batch,), such as the weight of the main loss; None for 1.

    Returns:
        A scalar, float32, >= 0.

    Raises:
        TrainingError: The shapes do not match.
    """
    return output(ours, base, weight)


PRESERVATIONS: dict[str, Preservation] = {
    "class_text": class_text,
    "context_text": context_text,
    "output": output,
    "context_output": context_output,
}


@full_precision()
def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return ``1 - cos`` along the last dimension: (..., width) to (...,), float32, in [0, 2]."""
    return 1.0 - F.cosine_similarity(a.float(), b.float(), dim=-1)


def normalize_rows(mask: Tensor) -> Tensor:
    """Return equal weights for the true positions of each row, which add up to 1.

    Args:
        mask: (rows, positions), boolean or 0 and 1.

    Returns:
        (rows, positions), float32; zeros in a row without true positions.
    """
    weights = mask.float()
    return weights / weights.sum(1, keepdim=True).clamp(min=1.0)


def end_position(ids: Sequence[int], end: int) -> int:
    """Return where CLIP pools a text: at its first end-of-text token, behind the last word.

    Args:
        ids: Token ids of one text.
        end: The id of the end-of-text token.

    Raises:
        ValueError: The text has no such token.
    """
    return ids.index(end)


def highest_id_position(ids: Sequence[int], end: int) -> int:
    """Return where ClassDiffusion's published code pools: at the highest id, as CLIP v1 did.

    New tokens have the highest ids, so this is the concept's last token. CLIP is causal: words
    behind that token, such as the class word, do not influence the feature. A text without new
    tokens is pooled at its end.

    Args:
        ids: Token ids of one text.
        end: Unused; see :func:`end_position`.
    """
    return ids.index(max(ids))


POOLINGS: dict[str, Callable[[Sequence[int], int], int]] = {
    "end": end_position,
    "published": highest_id_position,
}


def common_positions(ours: Sequence[int], base: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the positions of the common prefix and suffix of two texts.

    The concept and the class word may have different numbers of tokens, so the positions of the
    suffix differ.

    Args:
        ours: Token ids from the begin-of-text to the end-of-text token, without padding.
        base: Those of a text with other words in the middle.

    Returns:
        Positions in ours and in base of the same ids, equally many.
    """
    shorter = min(len(ours), len(base))
    before = 0
    while before < shorter and ours[before] == base[before]:
        before += 1
    after = 0
    while after < shorter - before and ours[-1 - after] == base[-1 - after]:
        after += 1

    def positions(length: int) -> list[int]:
        return [*range(before), *range(length - after, length)]

    return positions(len(ours)), positions(len(base))


def gather_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """Return the hidden states at some positions of each row.

    Args:
        hidden: (rows, length, width), any dtype.
        positions: (rows, n), int64, in [0, length).

    Returns:
        (rows, n, width).
    """
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))


def _check_shapes(ours: Tensor, base: Tensor, weight: Tensor | None, leading: int) -> None:
    fits = ours.ndim == leading + 1 and base.shape == ours.shape
    if not fits or not (weight is None or weight.shape == ours.shape[:leading]):
        weights = "" if weight is None else f" with weights of shape {tuple(weight.shape)}"
        raise TrainingError(
            f"features of shapes {tuple(ours.shape)} and {tuple(base.shape)}{weights} cannot be "
            "compared",
            fix="give as many features of the class as of the concept",
        )

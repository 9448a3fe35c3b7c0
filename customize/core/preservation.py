"""Class preservation: what keeps a model from forgetting a concept's class while it learns it.

A few pictures teach a model that "a <rex>" sits in two places and wears nothing; with them go what
it knew of dogs: that they can wear hats. A *preservation* compares what the learning model computes
with what the untouched one computes where the class is named instead, and gives a scalar loss:

    preservation(ours, base, weight) = mean_i  sum_j  weight_ij  distance(ours_ij, base_ij)

over samples i and, of texts, positions j. ``base`` needs no gradient. Distances are computed in
float32, whatever the precision of what is compared.
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
    """The semantic preservation loss of ClassDiffusion (arXiv 2405.17532), a cosine distance.

    Args:
        ours: (phrases, width), the text encoder's feature of phrases that name the concept.
        base: the same shape, of the phrases that name the class.
        weight: (phrases,), factors.

    Returns:
        A scalar, float32; between 0 and 2 without weights.

    Raises:
        TrainingError: the shapes do not fit together.
    """
    _check_shapes(ours, base, weight, 1)
    distance = cosine_distance(ours, base)
    return (distance if weight is None else distance * weight.float()).mean()


@full_precision()
def context_text(ours: Tensor, base: Tensor, weight: Tensor | None = None) -> Tensor:
    """CoRe's loss on the context of a concept (AAAI 2025, arXiv 2408.15914), a cosine distance.

    Args:
        ours: (prompts, positions, width), what the text encoder makes of all but the concept's own
            words in prompts that name the concept.
        base: the same shape, of the same words of prompts that name the class.
        weight: (prompts, positions), each position's share of its prompt, as
            :func:`normalize_rows` gives it; None: all positions count alike.

    Returns, raises:
        As :func:`class_text`.
    """
    _check_shapes(ours, base, weight, 2)
    distance = cosine_distance(ours, base)
    if weight is None:
        return distance.mean()
    return (distance * weight.float()).sum(1).mean()


@full_precision()
def output(ours: Tensor, base: Tensor, weight: Tensor | None = None) -> Tensor:
    """The squared change of what a denoiser answers to prompts that name the class.

    Args:
        ours: (batch, channels, *space), with the adapter.
        base: the same shape, without it, for the same latents, noise levels and prompts.
        weight: (batch,), such as the main loss has.

    Returns, raises:
        As :func:`class_text`; from 0 up.
    """
    return weighted_mse(ours, base, weight).mean()


def context_output(ours: Tensor, base: Tensor, weight: Tensor | None = None) -> Tensor:
    """The squared change of what a context does to a denoiser's answer; ours.

    What a run forgets of "a <rex> wearing a hat" is not how a dog looks in a hat, but what these
    words do beside its token. So it is their effect that is held, and nothing is said of what they
    are added to, the concept itself.

    Args:
        ours: (batch, channels, *space), the answer to prompts that name the concept in a context,
            less the one to prompts without it.
        base: the same shape and difference, of the class, without the adapter, for the same
            latents and noise levels.
        weight: (batch,), such as the main loss has.

    Returns, raises:
        As :func:`output`.
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
    """``1 - cos`` along the last dimension: (..., width) to (...,), float32, in [0, 2]."""
    return 1.0 - F.cosine_similarity(a.float(), b.float(), dim=-1)


def normalize_rows(counts: Tensor) -> Tensor:
    """(rows, positions) of booleans, true where something counts, to weights that add up to 1 in
    each row; to 0 in a row where nothing does."""
    counts = counts.float()
    return counts / counts.sum(1, keepdim=True).clamp(min=1.0)


def end_position(ids: Sequence[int], end: int) -> int:
    """Where CLIP pools a text: at its first end-of-text token, the one after the last word.

    Args:
        ids: of one text.
        end: the id of the end-of-text token.

    Raises:
        ValueError: the text has none.
    """
    return ids.index(end)


def highest_id_position(ids: Sequence[int], end: int) -> int:
    """Where ClassDiffusion's published code pools: at the highest id, as CLIP's first version did.

    A new token's id is above all others, so that this is the concept's last token. CLIP is causal:
    whatever comes after it, the class word too, has no part in the feature. A text without a new
    token is pooled at its end.

    Args:
        ids, end: as :func:`end_position`.
    """
    return ids.index(max(ids))


POOLINGS: dict[str, Callable[[Sequence[int], int], int]] = {
    "end": end_position,
    "published": highest_id_position,
}


def common_positions(ours: Sequence[int], base: Sequence[int]) -> tuple[list[int], list[int]]:
    """The positions of what two texts have in common before and after where they differ.

    The concept and the class word may have different numbers of tokens, so what comes before is
    counted from the beginning, and what comes after from the end.

    Args:
        ours, base: ids of one text each, from the beginning of text to the end of text, without
            padding; what is in the middle differs.

    Returns:
        Positions in ours and in base, of the same ids, as many.
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
    """The states at some positions of each row.

    Args:
        hidden: (rows, length, width).
        positions: (rows, n), int64, below the length.

    Returns:
        (rows, n, width).
    """
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))


def _check_shapes(ours: Tensor, base: Tensor, weight: Tensor | None, leading: int) -> None:
    wanted = ours.shape[:leading]
    fits = ours.ndim == leading + 1 and base.shape == ours.shape
    if not fits or not (weight is None or weight.shape == wanted):
        told = f"{tuple(ours.shape)} and {tuple(base.shape)}"
        raise TrainingError(
            f"features of shapes {told}"
            + ("" if weight is None else f" with weights of {tuple(weight.shape)}")
            + " cannot be compared",
            fix="give as many of the class as of the concept",
        )

"""CoRe's loss on the words around a concept (AAAI 2025, arXiv 2408.15914)."""

from __future__ import annotations

from torch import Tensor

from customize.core.precision import full_precision
from customize.core.preservation.distances import check_shapes, cosine_distance


@full_precision()
def context_text(learned: Tensor, base: Tensor, weight: Tensor | None = None) -> Tensor:
    """Compute the cosine distance of the words around the concept to those around the class.

    Args:
        learned: (prompts, positions, width), the text encoder's features of all words but the
            concept's own, in prompts that name the concept.
        base: The same shape, of the same words in prompts that name the class.
        weight: (prompts, positions), each position's share of its prompt, as
            :func:`customize.core.preservation.positions.normalize_rows` gives it; None for equal
            shares.

    Returns:
        A scalar, float32; between 0 and 2.

    Raises:
        TrainingError: The shapes do not fit together.
    """
    check_shapes(learned, base, weight, 2)
    distance = cosine_distance(learned, base)
    if weight is None:
        return distance.mean()
    return (distance * weight.float()).sum(1).mean()

"""The semantic preservation loss of ClassDiffusion (arXiv 2405.17532)."""

from __future__ import annotations

from torch import Tensor

from customize.core.precision import full_precision
from customize.core.preservation.distances import check_shapes, cosine_distance


@full_precision()
def class_text(learned: Tensor, base: Tensor, weight: Tensor | None = None) -> Tensor:
    """Compute the cosine distance of phrases that name the concept to those that name the class.

    Args:
        learned: (phrases, width), the text encoder's features of phrases that name the concept.
        base: The same shape, of the phrases that name the class.
        weight: (phrases,), factors.

    Returns:
        A scalar, float32; between 0 and 2 without weights.

    Raises:
        TrainingError: The shapes do not fit together.
    """
    check_shapes(learned, base, weight, 1)
    distance = cosine_distance(learned, base)
    return (distance if weight is None else distance * weight.float()).mean()

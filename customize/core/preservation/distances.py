"""The distance of text features, and the check of what is compared."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from customize.core.precision import full_precision
from customize.errors import TrainingError


@full_precision()
def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``1 - cos`` along the last dimension: (..., width) to (...,), float32, in [0, 2]."""
    return 1.0 - F.cosine_similarity(a.float(), b.float(), dim=-1)


def check_shapes(learned: Tensor, base: Tensor, weight: Tensor | None, leading: int) -> None:
    """Refuse features whose shapes differ, or that do not have ``leading`` dimensions and a width.

    Raises:
        TrainingError: The shapes, or that of the weight, do not fit together.
    """
    fits = learned.ndim == leading + 1 and base.shape == learned.shape
    if not fits or not (weight is None or weight.shape == learned.shape[:leading]):
        shapes = f"{tuple(learned.shape)} and {tuple(base.shape)}"
        raise TrainingError(
            f"features of shapes {shapes}"
            + ("" if weight is None else f" with weights of {tuple(weight.shape)}")
            + " cannot be compared",
            fix="give as many of the class as of the concept",
        )

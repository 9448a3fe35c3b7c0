"""The squared change of the denoiser's predictions for the class."""

from __future__ import annotations

from torch import Tensor

from customize.core.objectives import weighted_mse
from customize.core.precision import full_precision


@full_precision()
def output(learned: Tensor, base: Tensor, weight: Tensor | None = None) -> Tensor:
    """Compute the squared change of what a denoiser predicts for prompts that name the class.

    Args:
        learned: (batch, channels, *space), with the adapter.
        base: The same shape, without it, for the same latents, noise levels and prompts.
        weight: (batch,), such as that of the main loss.

    Returns:
        A scalar, float32, at least 0.

    Raises:
        TrainingError: The shapes do not fit together.
    """
    return weighted_mse(learned, base, weight).mean()

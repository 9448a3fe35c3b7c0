"""The squared difference of the changes that a context makes to the denoiser's predictions; ours.

What a run forgets of "a <rex> wearing a hat" is not how a dog looks in a hat, but what these words
change beside the trigger. So only their effect is preserved, and the concept itself is free.
"""

from __future__ import annotations

from torch import Tensor

from customize.core.objectives import weighted_mse
from customize.core.precision import full_precision


@full_precision()
def context_output(learned: Tensor, base: Tensor, weight: Tensor | None = None) -> Tensor:
    """Compute the squared difference of a context's effects beside the concept and the class.

    Args:
        learned: (batch, channels, *space), the prediction for prompts that name the concept in a
            context, minus that for prompts without the context.
        base: The same shape and difference, of the class, without the adapter, for the same
            latents and noise levels.
        weight: (batch,), such as that of the main loss.

    Returns:
        A scalar, float32, at least 0.

    Raises:
        TrainingError: The shapes do not fit together.
    """
    return weighted_mse(learned, base, weight).mean()

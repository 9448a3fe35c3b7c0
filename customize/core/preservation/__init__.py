"""Class preservation: losses that keep what a model knows of a concept's class while it learns.

A few pictures teach a model that "a <rex>" sits in two places and wears nothing, and with that it
forgets what it knew of dogs: that they can wear hats. A preservation loss compares what the
learning model computes for the concept with what the base model computes for the class::

    loss(learned, base, weight) = mean_i  sum_j  weight_ij  distance(learned_ij, base_ij)

over samples i and, for texts, positions j. Distances are computed in float32, whatever the dtype of
the inputs.

To add a loss, write a file in this folder with a function of the file's name, and list it in
:data:`PRESERVATIONS` with what it compares. The setting ``preserve`` then takes its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

#: What a loss compares, of the learning model (``learned``) and of the base model (``base``):
#:
#: - "phrase_feature": a text encoder's feature of phrases: (phrases, width);
#: - "context_features": its features of the words around the concept: (prompts, words, width);
#: - "class_prediction": the denoiser's prediction for captions with the class word: (batch,
#:   channels, \*space);
#: - "context_change": the change of the denoiser's prediction when a context, such as "wearing a
#:   hat", is added to the caption, of the concept and of the class: (batch, channels, \*space).
Comparison = Literal["phrase_feature", "context_features", "class_prediction", "context_change"]
#: The comparisons of text features.
TEXT_COMPARISONS: tuple[Comparison, ...] = ("phrase_feature", "context_features")
#: The comparisons that use the phrases of the setting ``preserve_phrases``.
PHRASE_COMPARISONS: tuple[Comparison, ...] = (*TEXT_COMPARISONS, "context_change")


@dataclass(frozen=True)
class PreservationLoss:
    """A loss by name, whose function is imported when it is called, as it needs torch.

    Attributes:
        name: Of the loss, its function, and the module of this package that holds it.
        compares: The inputs that the function gets.
    """

    name: str
    compares: Comparison

    def __call__(self, learned: Tensor, base: Tensor, weight: Tensor | None = None) -> Tensor:
        """Compute the loss.

        Args:
            learned: Of the learning model; the shape is that of :data:`Comparison`.
            base: The same shape, of the base model; needs no gradient.
            weight: Factors: (phrases,), (prompts, words) or (batch,); None for equal ones.

        Returns:
            A scalar, float32.

        Raises:
            TrainingError: The shapes do not fit together.
        """
        function = getattr(import_module(f"{__name__}.{self.name}"), self.name)
        loss: Tensor = function(learned, base, weight)
        return loss


#: Name -> loss, in the order in which they are computed and listed.
PRESERVATIONS: dict[str, PreservationLoss] = {
    loss.name: loss
    for loss in (
        PreservationLoss("class_text", compares="phrase_feature"),
        PreservationLoss("context_text", compares="context_features"),
        PreservationLoss("output", compares="class_prediction"),
        PreservationLoss("context_output", compares="context_change"),
    )
}


def select_losses(names: Iterable[str], *comparisons: Comparison) -> list[str]:
    """Return the names of the losses with these comparisons, in the order of the comparisons."""
    losses = [PRESERVATIONS[name] for name in names]
    return [loss.name for kind in comparisons for loss in losses if loss.compares == kind]

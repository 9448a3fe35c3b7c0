"""One call of the denoiser whose prompts are routed, and what is known of its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from customize.stages.concept_words import RoutedPrompt


@dataclass(eq=False)
class RoutedPicture:
    """What is known of one picture of the call.

    Attributes:
        routed: Its prompt.
        maps: (concepts of the prompt, frames, rows, columns), the sum over steps; None before the
            first.
        steps: The number of steps in the sum.
        masks: Of the same shape; None before they act, and where they are not found.
        masked: The number of steps that the masks are made of.
        is_divided: Whether the masks have more than one value.
    """

    routed: RoutedPrompt
    maps: Tensor | None = None
    steps: int = 0
    masks: Tensor | None = None
    masked: int = 0
    is_divided: bool = False

    def set_masks(self, masks: Tensor | None) -> None:
        """Let masks of the shape of the maps act from now on; None for none."""
        self.masks = masks
        self.is_divided = masks is not None and bool((masks != masks[:, :1, :1, :1]).any())


@dataclass(eq=False)
class RoutedCall:
    """One call of the denoiser.

    Attributes:
        pictures: Row of the batch -> its picture, without rows of other prompts.
        negatives: Rows of other prompts of routed pictures, such as the negative one.
        batch: Number of rows.
        grid: (frames, rows, columns) of the picture's tokens.
        texts: Length of the prompt in the denoiser's arguments.
        valid: (batch, texts), boolean: false for padding; None if all of it is read.
        finds: Whether maps are collected.
        queries: Of each attention that is running.
        keys: The same.
        maps: Row -> the maps of the layers so far.
        masks: What is computed once for all layers of a kind.
    """

    pictures: dict[int, RoutedPicture]
    negatives: Sequence[int]
    batch: int
    grid: tuple[int, int, int]
    texts: int
    valid: Tensor | None
    finds: bool
    queries: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[int, list[Tensor]] = field(default_factory=dict)
    masks: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def changed(self) -> frozenset[int]:
        """The rows in which concepts do not act on everything."""
        return frozenset((*self.pictures, *self.negatives))

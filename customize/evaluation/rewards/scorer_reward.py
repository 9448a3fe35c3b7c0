"""What rewards by a scoring model of the package share: loading, digest, and frames of videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from customize.evaluation.rewards.frames import mean_over_frames
from customize.evaluation.rewards.reward import Picture, weights_digest


class ScorerReward:
    """A reward by a scoring model.

    Args:
        model: Folder or hub id of the scorer's model with its processor.
        device: Device that the model runs on.

    Raises:
        PipelineError: The model cannot be loaded, is another model, or lacks weights.
    """

    name: str
    #: Class of :mod:`customize.evaluation`, called with model and device.
    scorer_class: ClassVar[Callable[..., Any]]

    def __init__(self, model: str | Path, device: str | torch.device = "cpu") -> None:
        self.scorer = type(self).scorer_class(model, device)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return weights_digest(self.scorer.model)

    def __call__(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> Tensor:
        """Scores (n,); prompts are truncated to the model's maximum length."""
        return mean_over_frames(self.score_images, pictures, prompts)

    def score_images(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """Scores (n,) of n images with a prompt each."""
        raise NotImplementedError

"""Image-text matching by BLIP-2: the probability that picture and prompt match."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from customize.evaluation.blip import Blip2Scorer
from customize.evaluation.rewards.frames import mean_over_frames
from customize.evaluation.rewards.reward import Picture, RewardKind, weights_digest


class Blip2ItmReward:
    """Probability that picture and prompt match by BLIP-2, in [0, 1].

    Args:
        model: Folder or hub id of a transformers Blip2ForImageTextRetrieval with its processor.
        device: Device that the model runs on.

    Raises:
        PipelineError: The model cannot be loaded, is another model, or lacks weights.
    """

    name = "blip2_itm"

    def __init__(self, model: str | Path, device: str | torch.device = "cpu") -> None:
        self.scorer = Blip2Scorer(model, device)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return weights_digest(self.scorer.model)

    def __call__(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> Tensor:
        """Scores (n,); prompts are truncated to the model's maximum length."""
        return mean_over_frames(self._score_images, pictures, prompts)

    def _score_images(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        return self.scorer.scores(images, prompts)["blip2_itm"]


BLIP2_ITM = RewardKind(
    name="blip2_itm",
    measures="probability that picture and prompt match",
    load=Blip2ItmReward,
    model="Salesforce/blip2-itm-vit-g",
)

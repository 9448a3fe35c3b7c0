"""PickScore: a CLIP ViT-H/14 trained on choices of people between two pictures of a prompt.

Pick-a-Pic (arXiv:2305.01569).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from customize.evaluation.clip import ClipScorer
from customize.evaluation.rewards.frames import mean_over_frames
from customize.evaluation.rewards.reward import Picture, RewardKind, weights_digest


class PickScoreReward:
    """Cosine of picture and prompt times the model's logit scale.

    Args:
        model: Folder or hub id of a transformers CLIP model with its processor.
        device: Device that the model runs on.

    Raises:
        PipelineError: The model cannot be loaded, is not a CLIP model, or lacks weights.
    """

    name = "pick_score"

    def __init__(self, model: str | Path, device: str | torch.device = "cpu") -> None:
        self.scorer = ClipScorer(model, device)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return weights_digest(self.scorer.model)

    def __call__(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> Tensor:
        """Scores (n,); prompts are truncated to CLIP's length."""
        return mean_over_frames(self._score_images, pictures, prompts)

    def _score_images(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        scale = self.scorer.model.logit_scale.exp().cpu()
        return scale * self.scorer.clip_t(images, prompts)


PICK_SCORE = RewardKind(
    name="pick_score",
    measures="preference of people, trained on Pick-a-Pic",
    load=PickScoreReward,
    model="yuvalkirstain/PickScore_v1",
)

"""CLIP-T: the cosine of a picture and its prompt."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from customize.evaluation.clip import ClipScorer
from customize.evaluation.rewards.reward import RewardKind
from customize.evaluation.rewards.scorer_reward import ScorerReward


class ClipReward(ScorerReward):
    """Cosine of picture and prompt by CLIP, in [-1, 1]."""

    name = "clip"
    scorer_class = ClipScorer

    def score_images(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """Cosines (n,)."""
        return self.scorer.clip_t(images, prompts)


CLIP = RewardKind(
    name="clip",
    measures="cosine of picture and prompt",
    load=ClipReward,
    model="openai/clip-vit-large-patch14",
)

"""PickScore: a CLIP ViT-H/14 trained on choices of people between two pictures of a prompt.

Pick-a-Pic (arXiv:2305.01569).
"""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from customize.evaluation.clip import ClipScorer
from customize.evaluation.rewards.reward import RewardKind
from customize.evaluation.rewards.scorer_reward import ScorerReward


class PickScoreReward(ScorerReward):
    """Cosine of picture and prompt times the model's logit scale."""

    name = "pick_score"
    scorer_class = ClipScorer

    def score_images(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """Scaled cosines (n,)."""
        scale: Tensor = self.scorer.model.logit_scale.exp().cpu()
        return scale * self.scorer.clip_t(images, prompts)


PICK_SCORE = RewardKind(
    name="pick_score",
    measures="preference of people, trained on Pick-a-Pic",
    load=PickScoreReward,
    model="yuvalkirstain/PickScore_v1",
)

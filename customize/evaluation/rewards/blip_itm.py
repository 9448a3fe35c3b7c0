"""Image-text matching by BLIP: the probability that picture and prompt match."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from customize.evaluation.blip import BlipScorer
from customize.evaluation.rewards.reward import RewardKind
from customize.evaluation.rewards.scorer_reward import ScorerReward


class BlipItmReward(ScorerReward):
    """Probability that picture and prompt match by BLIP, in [0, 1]."""

    name = "blip_itm"
    scorer_class = BlipScorer

    def score_images(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """Probabilities (n,)."""
        return self.scorer.scores(images, prompts)["blip_itm"]


BLIP_ITM = RewardKind(
    name="blip_itm",
    measures="probability that picture and prompt match",
    load=BlipItmReward,
    model="Salesforce/blip-itm-base-coco",
)

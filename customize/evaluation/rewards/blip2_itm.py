"""Image-text matching by BLIP-2: the probability that picture and prompt match."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from customize.evaluation.blip import Blip2Scorer
from customize.evaluation.rewards.reward import RewardKind
from customize.evaluation.rewards.scorer_reward import ScorerReward


class Blip2ItmReward(ScorerReward):
    """Probability that picture and prompt match by BLIP-2, in [0, 1]."""

    name = "blip2_itm"
    scorer_class = Blip2Scorer

    def score_images(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """Probabilities (n,)."""
        return self.scorer.scores(images, prompts)["blip2_itm"]


BLIP2_ITM = RewardKind(
    name="blip2_itm",
    measures="probability that picture and prompt match",
    load=Blip2ItmReward,
    model="Salesforce/blip2-itm-vit-g",
)

"""ImageReward: human preference by a BLIP with a regression head (arXiv:2304.05977).

Written for the API of image-reward 1.5: `ImageReward.load(name, device, download_root, med_config)`
returns a module whose `score(prompt, image)` takes one PIL image and returns a float. The package
reads its published checkpoint, a pickle, with `torch.load`, which restricts it to tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from customize.evaluation.rewards.frames import mean_over_frames
from customize.evaluation.rewards.optional_package import call_package, import_optional
from customize.evaluation.rewards.reward import Picture, RewardKind, weights_digest

_INSTALL = "pip install image-reward git+https://github.com/openai/CLIP.git"


class ImageRewardReward:
    """Predicted preference, standardised over the training data.

    Args:
        model: Name of a model of the package.
        device: Device that the model runs on.

    Raises:
        PipelineError: image-reward is not installed, or cannot load the model.
    """

    name = "image_reward"

    def __init__(self, model: str, device: str | torch.device = "cpu") -> None:
        package = import_optional("ImageReward", self.name, _INSTALL)
        self.model = call_package(
            "image-reward", model, package.load, name=str(model), device=torch.device(device)
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return weights_digest(self.model)

    def __call__(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> Tensor:
        """Scores (n,)."""
        return mean_over_frames(self._score_images, pictures, prompts)

    def _score_images(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        pairs = zip(images, prompts, strict=True)
        return torch.tensor([self.model.score(prompt=text, image=image) for image, text in pairs])


IMAGE_REWARD = RewardKind(
    name="image_reward",
    measures="preference of people",
    load=ImageRewardReward,
    model="ImageReward-v1.0",
    needs="image-reward",
)

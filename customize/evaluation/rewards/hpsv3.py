"""HPSv3: human preference by a Qwen2-VL-7B with a ranking head (arXiv:2508.03789).

Written for `HPSv3RewardInferencer(config_path, checkpoint_path, device, differentiable)` of hpsv3
1.0.0. Its `reward` takes `image_paths` before `prompts`, the repository's later version `prompts`
before `image_paths`; both take PIL images and return mean and deviation (n, 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from customize.errors import PipelineError
from customize.evaluation.rewards.frames import mean_over_frames
from customize.evaluation.rewards.optional_package import call_package, import_optional
from customize.evaluation.rewards.reward import Picture, RewardKind, weights_digest
from customize.evaluation.scorer_models import split_batches

# hpsv3 1.0.0 requires transformers 4.45.2, which pip refuses beside this package.
_INSTALL = "pip install --no-deps hpsv3, and what it imports"


class Hpsv3Reward:
    """Mean of the predicted preference.

    Args:
        model: Safetensors file of the weights; None: the package downloads MizzenAI/HPSv3.
        device: Device that the model runs on.

    Raises:
        PipelineError: hpsv3 is not installed, the file is a pickle, or hpsv3 cannot load it.
    """

    name = "hpsv3"

    def __init__(self, model: str | Path | None = None, device: str | torch.device = "cpu") -> None:
        hpsv3 = import_optional("hpsv3", self.name, _INSTALL)
        if model is not None and Path(model).suffix != ".safetensors":
            raise PipelineError(
                "the weights are not a safetensors file",
                where=model,
                fix="give HPSv3.safetensors of MizzenAI/HPSv3",
            )
        self.inferencer = call_package(
            "hpsv3",
            model or "MizzenAI/HPSv3",
            hpsv3.HPSv3RewardInferencer,
            checkpoint_path=None if model is None else str(model),
            device=str(device),
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return weights_digest(self.inferencer.model)

    def __call__(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> Tensor:
        """Scores (n,)."""
        return mean_over_frames(self._score_images, pictures, prompts)

    def _score_images(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        parts = zip(split_batches(images), split_batches(prompts), strict=True)
        outputs = [self.inferencer.reward(prompts=texts, image_paths=part) for part, texts in parts]
        return torch.cat([output[:, 0].float().cpu() for output in outputs])


HPSV3 = RewardKind(
    name="hpsv3",
    measures="preference of people",
    load=Hpsv3Reward,
    needs="hpsv3",
)

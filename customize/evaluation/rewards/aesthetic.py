"""LAION's aesthetic predictor: a linear head on the image embeddings of CLIP.

The published head, `sa_0_4_vit_l_14_linear.pth` of LAION-AI/aesthetic-predictor, belongs to CLIP
ViT-L/14 and is a pickle; see the guide of this package for its conversion.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from customize.errors import ConfigError, PipelineError
from customize.evaluation.clip import ClipScorer
from customize.evaluation.rewards.frames import mean_over_frames
from customize.evaluation.rewards.reward import Picture, RewardKind, weights_digest
from customize.safe_read import read_safetensors
from customize.text import quote

#: The head in the folder or hub repository of its CLIP model: weight (1, width) and bias (1,).
HEAD_FILE = "aesthetic_head.safetensors"


class AestheticReward:
    """Predicted rating of a picture by people, about 1 to 10; prompts are not read.

    Args:
        model: Folder or hub id of a transformers CLIP model with its processor, and beside them
            :data:`HEAD_FILE`.
        device: Device that the model runs on.

    Raises:
        ConfigError: No model is given.
        PipelineError: The model or the head cannot be loaded, is incomplete, or does not fit.
    """

    name = "aesthetic"

    def __init__(self, model: str | Path | None, device: str | torch.device = "cpu") -> None:
        if model is None:
            raise ConfigError(
                "the aesthetic reward has no published model with safetensors weights",
                where="model",
                fix=f"give a folder with a CLIP ViT-L/14 model and {HEAD_FILE}",
            )
        self.scorer = ClipScorer(model, device)
        self.head = _load_head(model, self.scorer.model.config.projection_dim)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights of CLIP's image encoder and of the head."""
        clip = self.scorer.model
        used = nn.ModuleList([clip.vision_model, clip.visual_projection, self.head])
        return weights_digest(used)

    def __call__(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> Tensor:
        """Scores (n,)."""
        return mean_over_frames(self._score_images, pictures, prompts)

    def _score_images(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        scores: Tensor = self.head(self.scorer.embed_images(images))
        return scores[:, 0]


def _load_head(model: str | Path, width: int) -> nn.Linear:
    from transformers.utils.hub import cached_file

    problem = error = None
    try:
        path = cached_file(str(model), HEAD_FILE)
        tensors = load(read_safetensors(path))
    except (OSError, ValueError, SafetensorError) as caught:
        problem, error = next(iter(str(caught).splitlines()), "it is unreadable"), caught
    else:
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if shapes != {"weight": (1, width), "bias": (1,)}:
            problem = f"its tensors are {quote(shapes)}"
        elif not all(t.is_floating_point() and t.isfinite().all() for t in tensors.values()):
            problem = "its values are not finite numbers"
    if problem:
        raise PipelineError(
            f"the aesthetic head cannot be loaded: {problem}",
            where=f"{model}/{HEAD_FILE}",
            fix=f"save it with safetensors: weight (1, {width}) and bias (1,)",
        ) from error
    head = nn.Linear(width, 1).requires_grad_(False)
    head.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
    return head.eval()


AESTHETIC = RewardKind(
    name="aesthetic",
    measures="predicted rating by people, about 1 to 10",
    load=AestheticReward,
)

"""CLIP-T: the cosine of a picture and its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from customize.evaluation.clip import ClipScorer
from customize.evaluation.rewards.frames import mean_over_frames
from customize.evaluation.rewards.reward import Picture, RewardKind, weights_digest


class ClipReward:
    """Cosine of picture and prompt by CLIP, in [-1, 1].

    Args:
        model: Folder or hub id of a transformers CLIP model with its processor.
        device: Device that the model runs on.

    Raises:
        PipelineError: The model cannot be loaded, is not a CLIP model, or lacks weights.
    """

    name = "clip"

    def __init__(self, model: str | Path, device: str | torch.device = "cpu") -> None:
        self.scorer = ClipScorer(model, device)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return weights_digest(self.scorer.model)

    def __call__(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> Tensor:
        """Scores (n,); prompts are truncated to CLIP's length."""
        return mean_over_frames(self.scorer.clip_t, pictures, prompts)


CLIP = RewardKind(
    name="clip",
    measures="cosine of picture and prompt",
    load=ClipReward,
    model="openai/clip-vit-large-patch14",
)

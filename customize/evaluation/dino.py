"""DINO-I: mean cosine of a picture with each of the references, by DINO (DreamBooth)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from customize.core.precision import full_precision
from customize.evaluation.scorer_models import (
    load_model,
    load_pretrained,
    pixel_batches,
    unit_features,
)

# config.json's model_type of what is understood; DINO itself is a plain ViT.
TYPES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")


class DinoScorer:
    """DINO-I from a DINO, DINOv2 or DINOv3 model: cosine of class-token features.

    Args:
        model: folder or hub id of the transformers model with its image processor.

    Raises:
        PipelineError: it is not there, not of these kinds, or not whole.
    """

    def __init__(self, model: str | Path, device: str | torch.device = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModel

        # DINO's published ViTs come without the pooler, which is not used here.
        loaded = load_model(AutoModel, model, "DINO", TYPES, unused=("pooler.",))
        self.model = loaded.to(device)
        self.processor = load_pretrained(
            AutoImageProcessor, model, "the DINO model's image processor"
        )
        self.device = device

    @full_precision(tf32=True)
    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, d), float32, on the CPU: the class token after the last layer norm."""
        return torch.cat(
            [
                unit_features(self.model(pixel_values=part).last_hidden_state[:, 0])
                for part in pixel_batches(self.processor, pictures, self.device)
            ]
        )

    @full_precision(tf32=True)
    def dino_i(self, pictures: Sequence[Image.Image], references: Sequence[Image.Image]) -> Tensor:
        """Mean cosine (n,) of each picture with the references."""
        return (self.images(pictures) @ self.images(references).T).mean(1)

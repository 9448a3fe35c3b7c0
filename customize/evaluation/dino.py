"""DINO-I: mean cosine of an image with each reference image, by DINO (DreamBooth)."""

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

# Accepted values of model_type in config.json; DINO itself is a plain ViT.
TYPES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")


class DinoScorer:
    """Computes DINO-I, the cosine of class tokens, with a DINO, DINOv2 or DINOv3 model.

    Args:
        model: Folder or hub id of the transformers model with its image processor.
        device: Device that the model runs on.

    Raises:
        PipelineError: The model cannot be loaded, has another type, or lacks weights.
    """

    def __init__(self, model: str | Path, device: str | torch.device = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModel

        # DINO's published ViTs lack the pooler, which DINO-I does not use.
        loaded = load_model(AutoModel, model, "DINO", TYPES, unused=("pooler.",))
        self.model = loaded.to(device)
        self.processor = load_pretrained(
            AutoImageProcessor, model, "the DINO model's image processor"
        )
        self.device = device

    @full_precision(tf32=True)
    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, d), float32, on the CPU: the class token after the last layer norm."""
        return torch.cat(
            [
                unit_features(self.model(pixel_values=part).last_hidden_state[:, 0])
                for part in pixel_batches(self.processor, images, self.device)
            ]
        )

    @full_precision(tf32=True)
    def dino_i(self, images: Sequence[Image.Image], references: Sequence[Image.Image]) -> Tensor:
        """Mean cosine (n,) of each image with the references, in [-1, 1]."""
        return (self.embed_images(images) @ self.embed_images(references).T).mean(1)

"""CLIP-T and CLIP-I: cosines of an image with its prompt, and with reference images.

CLIP-I is the mean cosine of an image with each reference (Textual Inversion, DreamBooth). Before
CLIP-T, triggers in prompts should be replaced by the class word, as CLIP does not know them.
"""

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
    split_batches,
    unit_features,
)


class ClipScorer:
    """Computes CLIP-T and CLIP-I with a CLIP model.

    Args:
        model: Folder or hub id of a transformers CLIP model with its processor.
        device: Device that the model runs on.

    Raises:
        PipelineError: The model cannot be loaded, is not a CLIP model, or lacks weights.
    """

    def __init__(self, model: str | Path, device: str | torch.device = "cpu") -> None:
        from transformers import AutoProcessor, CLIPModel

        self.model = load_model(CLIPModel, model, "CLIP", ("clip",)).to(device)
        self.processor = load_pretrained(AutoProcessor, model, "the CLIP model's processor")
        self.device = device

    @full_precision(tf32=True)
    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, d) of images, float32, on the CPU."""
        return torch.cat(
            [
                unit_features(self.model.get_image_features(pixel_values=part))
                for part in pixel_batches(self.processor, images, self.device)
            ]
        )

    @full_precision(tf32=True)
    @torch.no_grad()
    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (n, d) of prompts, truncated to CLIP's length, float32, on the CPU."""
        embeddings = []
        for part in split_batches(prompts):
            inputs = self.processor(text=part, padding=True, truncation=True, return_tensors="pt")
            embeddings.append(unit_features(self.model.get_text_features(**inputs.to(self.device))))
        return torch.cat(embeddings)

    def clip_t(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Cosine (n,) of each image with its prompt, in [-1, 1]."""
        return (self.embed_images(images) * self.embed_texts(prompts)).sum(-1)

    def clip_i(self, images: Sequence[Image.Image], references: Sequence[Image.Image]) -> Tensor:
        """Mean cosine (n,) of each image with the references, in [-1, 1]."""
        return (self.embed_images(images) @ self.embed_images(references).T).mean(1)

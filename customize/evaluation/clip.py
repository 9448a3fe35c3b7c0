"""CLIP-T and CLIP-I: cosines of a picture with its prompt, and with pictures of the concept.

CLIP-I is the mean cosine of a picture with each of the references (Textual Inversion, DreamBooth).
Triggers should be replaced by the class word in prompts before CLIP-T, since CLIP has never read
them.
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
    """CLIP-T and CLIP-I from one CLIP model.

    Args:
        model: folder or hub id of a transformers CLIP model with its processor.

    Raises:
        PipelineError: it is not there, not a CLIP model, or not whole.
    """

    def __init__(self, model: str | Path, device: str | torch.device = "cpu") -> None:
        from transformers import AutoProcessor, CLIPModel

        self.model = load_model(CLIPModel, model, "CLIP", ("clip",)).to(device)
        self.processor = load_pretrained(AutoProcessor, model, "the CLIP model's processor")
        self.device = device

    @full_precision(tf32=True)
    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, d) of pictures, float32, on the CPU."""
        return torch.cat(
            [
                unit_features(self.model.get_image_features(pixel_values=part))
                for part in pixel_batches(self.processor, pictures, self.device)
            ]
        )

    @full_precision(tf32=True)
    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (n, d) of prompts, cut at CLIP's length, float32, on the CPU."""
        found = []
        for part in split_batches(prompts):
            inputs = self.processor(text=part, padding=True, truncation=True, return_tensors="pt")
            found.append(unit_features(self.model.get_text_features(**inputs.to(self.device))))
        return torch.cat(found)

    def clip_t(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Cosine (n,) of each picture with its prompt."""
        return (self.images(pictures) * self.texts(prompts)).sum(-1)

    def clip_i(self, pictures: Sequence[Image.Image], references: Sequence[Image.Image]) -> Tensor:
        """Mean cosine (n,) of each picture with the references."""
        return (self.images(pictures) @ self.images(references).T).mean(1)

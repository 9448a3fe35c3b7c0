"""Similarities for real models: CLIP-T, CLIP-I and DINO-I, from models that the user names.

CLIP-T is the cosine between a picture and its prompt, CLIP-I and DINO-I the mean cosine between a
picture and each of the references (Textual Inversion, DreamBooth). Triggers should be replaced by
the class word in prompts before CLIP-T, since CLIP has never read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from customize.errors import PipelineError

# Pictures or prompts a call.
BATCH = 32
# config.json's model_type of what each scorer understands; DINO itself is a plain ViT.
CLIP_TYPES = ("clip",)
DINO_TYPES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")


class ClipScorer:
    """CLIP-T and CLIP-I from one CLIP model.

    Args:
        model: folder or hub id of a transformers CLIP model with its processor.

    Raises:
        PipelineError: it is not there, not a CLIP model, or not whole.
    """

    def __init__(self, model: str | Path, device: str | torch.device = "cpu") -> None:
        from transformers import AutoProcessor, CLIPModel

        self.model = _load_model(CLIPModel, model, "CLIP", CLIP_TYPES).to(device)
        self.processor = _load(AutoProcessor, model, "the CLIP model's processor")
        self.device = device

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, d) of pictures, float32, on the CPU."""
        return torch.cat(
            [
                _unit(self.model.get_image_features(pixel_values=pixels))
                for pixels in _pixels(self.processor, pictures, self.device)
            ]
        )

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (n, d) of prompts, cut at CLIP's length, float32, on the CPU."""
        found = []
        for part in _batches(prompts):
            inputs = self.processor(text=part, padding=True, truncation=True, return_tensors="pt")
            found.append(_unit(self.model.get_text_features(**inputs.to(self.device))))
        return torch.cat(found)

    def clip_t(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Cosine (n,) of each picture with its prompt."""
        return (self.images(pictures) * self.texts(prompts)).sum(-1)

    def clip_i(self, pictures: Sequence[Image.Image], references: Sequence[Image.Image]) -> Tensor:
        """Mean cosine (n,) of each picture with the references."""
        return (self.images(pictures) @ self.images(references).T).mean(1)


class DinoScorer:
    """DINO-I from a DINO, DINOv2 or DINOv3 model: cosine of class-token features.

    Args:
        model: folder or hub id of the transformers model with its image processor.

    Raises:
        PipelineError: it is not there, not of these kinds, or not whole.
    """

    def __init__(self, model: str | Path, device: str | torch.device = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.model = _load_model(AutoModel, model, "DINO", DINO_TYPES).to(device)
        self.processor = _load(AutoImageProcessor, model, "the DINO model's image processor")
        self.device = device

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, d), float32, on the CPU: the class token after the last layer norm."""
        return torch.cat(
            [
                _unit(self.model(pixel_values=pixels).last_hidden_state[:, 0])
                for pixels in _pixels(self.processor, pictures, self.device)
            ]
        )

    def dino_i(self, pictures: Sequence[Image.Image], references: Sequence[Image.Image]) -> Tensor:
        """Mean cosine (n,) of each picture with the references."""
        return (self.images(pictures) @ self.images(references).T).mean(1)


def _pixels(
    processor: Any, pictures: Sequence[Image.Image], device: str | torch.device
) -> Iterator[Tensor]:
    """Pictures as a model takes them, a batch at a time."""
    for part in _batches(pictures):
        yield processor(images=part, return_tensors="pt")["pixel_values"].to(device)


def _load_model(loader: Any, model: str | Path, kind: str, types: Sequence[str]) -> Any:
    """A model in evaluation mode, refused where weights would be made up.

    transformers loads any folder as any class and fills what is missing at random, with a warning.
    """
    from transformers import AutoConfig

    what = f"the {kind} model"
    found = _load(AutoConfig, model, what).model_type
    if found not in types:
        raise PipelineError(
            f"this is a model of type {found}, not a {kind} model",
            where=model,
            fix=f"give one of type {' or '.join(types)}",
        )
    loaded, notes = _load(loader, model, what, use_safetensors=True, output_loading_info=True)
    # DINO's published ViTs come without the pooler, which is not used here.
    missing = sorted(key for key in notes["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise PipelineError(
            f"{what} lacks {len(missing)} weights, such as {missing[0]}",
            where=model,
            fix="give the folder or hub id of a whole model",
        )
    return loaded.eval()


def _load(loader: Any, model: str | Path, what: str, **settings: Any) -> Any:
    try:
        return loader.from_pretrained(model, **settings)
    except Exception as error:  # files missing, offline, gated, damaged: all the same here
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise PipelineError(
            f"{what} cannot be loaded: {reason}",
            where=model,
            fix="give the folder or hub id of a transformers model with safetensors weights",
        ) from error


def _batches(items: Sequence[Any]) -> list[list[Any]]:
    return [list(items[first : first + BATCH]) for first in range(0, len(items), BATCH)]


def _unit(features: Any) -> Tensor:
    """Features (n, d) as unit vectors; transformers 5 wraps CLIP's in an output object."""
    pooled: Tensor = getattr(features, "pooler_output", features)
    return F.normalize(pooled.float().cpu(), dim=-1)

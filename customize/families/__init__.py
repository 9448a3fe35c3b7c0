"""All that differs between model families, one file each; nothing else asks which it has."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from customize.errors import PipelineError
from customize.families.base import Family, TokenDictionary, class_name
from customize.families.flux import Flux
from customize.families.qwen_image import QwenImage
from customize.families.sd import StableDiffusion
from customize.families.sd3 import StableDiffusion3
from customize.families.sdxl import StableDiffusionXL
from customize.families.z_image import ZImage

__all__ = ["FAMILIES", "Family", "TokenDictionary", "family_of", "published_families"]

FAMILIES: dict[str, type[Family]] = {
    family.name: family
    for family in (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, QwenImage, ZImage)
}


def family_of(components: Mapping[str, Any]) -> Family:
    """The family of a pipeline's components.

    Args:
        components: component name -> object, as ``pipe.components`` gives.

    Raises:
        PipelineError: no family knows these components, or one knows that it cannot use them.
    """
    for family in FAMILIES.values():
        if family.matches(components):
            return family(components)
    keys = [key for key in components if key.startswith(("unet", "transformer", "text_encoder"))]
    found = [f"{key}: {_described(components[key])}" for key in keys]
    raise PipelineError(
        f"no known model family has these parts: {', '.join(found) or 'no denoiser at all'}",
        fix=f"use a pipeline of one of the families {', '.join(FAMILIES)}",
    )


@functools.cache
def published_families() -> tuple[Family, ...]:
    """Every family in each of its published sizes, without weights: what a file without a
    pipeline can be compared with."""
    with torch.device("meta"):
        return tuple(
            family(components) for family in FAMILIES.values() for components in family.published()
        )


def _described(component: Any) -> str:
    # What tells apart models whose UNets are of the same class.
    extra = getattr(getattr(component, "config", None), "addition_embed_type", None)
    return class_name(component) + (f" with {extra} embeddings" if extra else "")

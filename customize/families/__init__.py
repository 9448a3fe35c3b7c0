"""All that differs between model families, one file each; nothing else asks which it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from customize.errors import PipelineError
from customize.families.base import NO_CONFIG, Family, TokenDictionary, class_name
from customize.families.flux import Flux
from customize.families.flux2 import Flux2
from customize.families.krea2 import Krea2
from customize.families.qwen_image import QwenImage
from customize.families.qwen_image_21 import QwenImage21
from customize.families.sd import StableDiffusion
from customize.families.sd3 import StableDiffusion3
from customize.families.sdxl import StableDiffusionXL
from customize.families.z_image import ZImage

__all__ = ["FAMILIES", "Family", "TokenDictionary", "family_of"]

FAMILIES: dict[str, type[Family]] = {
    family.name: family
    for family in (
        StableDiffusion,
        StableDiffusionXL,
        StableDiffusion3,
        Flux,
        Flux2,
        QwenImage,
        QwenImage21,
        ZImage,
        Krea2,
    )
}


def family_of(
    components: Mapping[str, Any], pipeline_config: Mapping[str, Any] = NO_CONFIG
) -> Family:
    """The family of a pipeline's components.

    Args:
        components: component name -> object, as ``pipe.components`` gives.
        pipeline_config: as ``pipe.config`` gives. Without it some families know the names of their
            layers, but not how their pipeline reads prompts or sets its schedule.

    Raises:
        PipelineError: no family knows these components, or one knows that it cannot use them.
    """
    for family in FAMILIES.values():
        if family.matches(components):
            return family(components, pipeline_config)
    keys = [key for key in components if key.startswith(("unet", "transformer", "text_encoder"))]
    found = [f"{key}: {_described(components[key])}" for key in keys]
    raise PipelineError(
        f"no known model family has these parts: {', '.join(found) or 'no denoiser at all'}",
        fix=f"use a pipeline of one of the families {', '.join(FAMILIES)}",
    )


def _described(component: Any) -> str:
    # What tells apart models whose UNets are of the same class.
    extra = getattr(getattr(component, "config", None), "addition_embed_type", None)
    return class_name(component) + (f" with {extra} embeddings" if extra else "")

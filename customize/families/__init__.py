"""All that differs between model families, one file each; nothing else asks which it has."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from customize.errors import PipelineError
from customize.families.cogvideox import CogVideoX
from customize.families.family import Family
from customize.families.flux import Flux
from customize.families.flux2 import Flux2
from customize.families.flux3 import Flux3
from customize.families.krea2 import Krea2
from customize.families.ltx2 import LTX2
from customize.families.pipeline_components import NO_CONFIG, TokenDictionary, class_name
from customize.families.qwen_image import QwenImage
from customize.families.qwen_image_21 import QwenImage21
from customize.families.sd import StableDiffusion
from customize.families.sd3 import StableDiffusion3
from customize.families.sdxl import StableDiffusionXL
from customize.families.wan import Wan
from customize.families.z_image import ZImage

__all__ = [
    "COMPONENTS",
    "FAMILIES",
    "Family",
    "TokenDictionary",
    "family_of",
    "published_families",
]

FAMILIES: dict[str, type[Family]] = {
    family.name: family
    for family in (
        StableDiffusion,
        StableDiffusionXL,
        StableDiffusion3,
        Flux,
        Flux2,
        Flux3,
        QwenImage,
        QwenImage21,
        ZImage,
        Krea2,
        Wan,
        CogVideoX,
        LTX2,
    )
}

#: The names of all components that some family works with.
COMPONENTS = frozenset(name for family in FAMILIES.values() for name in family.component_names())


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
    fix = f"use a pipeline of one of the families {', '.join(FAMILIES)}"
    if keys and all(components[key] is None for key in keys if not key.startswith("text_encoder")):
        # A modular pipeline begins without weights, and may be made of a part of the steps.
        fix = (
            "load them with load_components(), or, where the pipeline is made of some steps only, "
            "go through one that has the denoiser too: concepts are in the parts that they share"
        )
    raise PipelineError(
        f"no known model family has these parts: {', '.join(found) or 'no denoiser at all'}",
        fix=fix,
    )


@functools.cache
def published_families() -> tuple[Family, ...]:
    """Every family in each of its published sizes, without weights: what a file without a
    pipeline can be compared with."""
    with torch.device("meta"):
        return tuple(
            family(components)
            for family in FAMILIES.values()
            for components in family.published_models()
        )


def _described(component: Any) -> str:
    # What tells apart models whose UNets are of the same class.
    extra = getattr(getattr(component, "config", None), "addition_embed_type", None)
    return class_name(component) + (f" with {extra} embeddings" if extra else "")

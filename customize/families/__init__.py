"""The model families, one file each; only these modules depend on the family of a model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from customize.errors import PipelineError
from customize.families.cogvideox import CogVideoX
from customize.families.family import Family
from customize.families.flux import Flux
from customize.families.flux2 import Flux2
from customize.families.flux3 import Flux3
from customize.families.krea2 import Krea2
from customize.families.ltx2 import LTX2
from customize.families.meta_models import on_meta_device
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

#: The names of the components that any family uses.
COMPONENTS = frozenset(name for family in FAMILIES.values() for name in family.component_names())


def family_of(
    components: Mapping[str, Any], pipeline_config: Mapping[str, Any] = NO_CONFIG
) -> Family:
    """Return the family of a pipeline's components.

    Args:
        components: Component name -> object, as in ``pipe.components``.
        pipeline_config: As ``pipe.config``. Without it, some families know the names of their
            layers, but not how their pipeline reads prompts or sets its schedule.

    Raises:
        PipelineError: No family matches these components, or the matching one does not support
            this variant of the model.
    """
    for family in FAMILIES.values():
        if family.matches(components):
            return family(components, pipeline_config)
    keys = [key for key in components if key.startswith(("unet", "transformer", "text_encoder"))]
    classes = [f"{key}: {_describe(components[key])}" for key in keys]
    fix = f"use a pipeline of one of the families {', '.join(FAMILIES)}"
    if keys and all(components[key] is None for key in keys if not key.startswith("text_encoder")):
        # A modular pipeline starts without weights and may consist of some of the steps only.
        fix = (
            "load them with load_components(), or, where the pipeline is made of some steps only, "
            "go through one that has the denoiser too: concepts are in the parts that they share"
        )
    raise PipelineError(
        f"no known model family has these parts: {', '.join(classes) or 'no denoiser at all'}",
        fix=fix,
    )


@functools.cache
def published_families() -> tuple[Family, ...]:
    """Return every family in each of its published sizes, without weights.

    A file without a pipeline is compared with them to detect its family.
    """
    with on_meta_device():
        return tuple(
            family(components)
            for family in FAMILIES.values()
            for components in family.published_models()
        )


def _describe(component: Any) -> str:
    # The type of additional embeddings distinguishes models whose UNets have the same class.
    extra = getattr(getattr(component, "config", None), "addition_embed_type", None)
    return class_name(component) + (f" with {extra} embeddings" if extra else "")

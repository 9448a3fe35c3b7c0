"""How the denoisers of each family read reference tokens: one file for each kind of denoiser.

A seam answers which attention layers an adapter has, and attaches an adapter:

    seam = seam_of(family)
    adapter = make_adapter(config, family)
    with seam.attached(family.denoiser, adapter) as attachment, attachment.condition(tokens):
        prediction = family.predict(noisy, t, conditions)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from customize.errors import PipelineError
from customize.families import Family
from customize.families.pipeline_components import uncompiled
from customize.references.adapter import AttentionLayers, ReferenceAdapter
from customize.references.config import ReferencesConfig
from customize.references.seams import flux, sd3, unet
from customize.references.seams.attachment import Attachment, Scale
from customize.references.seams.blocks import expand_block_scale


@dataclass(frozen=True)
class Seam:
    """How a family's denoiser reads reference tokens.

    Attributes:
        attention_layers: ``attention_layers(family)`` returns what an adapter adapts.
        attached: ``attached(denoiser, adapter, scale=1.0)`` returns a context manager that yields
            an :class:`~customize.references.seams.attachment.Attachment`. ``scale`` is a number, or
            a function of a module's name.
        expand_scale: ``expand_scale(family, scale)`` converts a dict of scales by block to such a
            function.
        has_text_values: Whether values of a text depend on its encoding alone, so that the
            attachment removes what is avoided from the values of tokens.
    """

    attention_layers: Callable[[Family], AttentionLayers]
    attached: Callable[..., AbstractContextManager[Attachment]]
    expand_scale: Callable[[Family, Any], Scale]
    has_text_values: bool = False


#: Name of a family -> its seam.
SEAMS: dict[str, Seam] = {
    "sd": Seam(unet.attention_layers, unet.attached, unet.expand_scale, has_text_values=True),
    "sdxl": Seam(unet.attention_layers, unet.attached, unet.expand_scale, has_text_values=True),
    "sd3": Seam(sd3.attention_layers, sd3.attached, expand_block_scale),
    "flux": Seam(flux.attention_layers, flux.attached, expand_block_scale),
}


def seam_of(family: Family) -> Seam:
    """Return the seam of a family.

    Raises:
        PipelineError: Its denoiser has none.
    """
    if family.name not in SEAMS:
        raise PipelineError(
            f"models of family {family.name} read no reference tokens",
            where="reference_images",
            fix=f"use a model of family {', '.join(SEAMS)}",
        )
    return SEAMS[family.name]


def make_adapter(config: ReferencesConfig, family: Family) -> ReferenceAdapter:
    """Create an untrained adapter for the denoiser of a family.

    Keys and values start as the text's where their widths agree; LoRAs start at zero.

    Args:
        config: Width of the tokens, rank and alpha of the LoRAs.
        family: The model.

    Returns:
        The adapter in float32, on the CPU.

    Raises:
        PipelineError: The family's denoiser reads no reference tokens.
    """
    layers = seam_of(family).attention_layers(family)
    adapter = ReferenceAdapter(layers, config.width, config.lora_rank, config.lora_alpha)
    adapter.copy_text_projections(uncompiled(family.denoiser))
    return adapter

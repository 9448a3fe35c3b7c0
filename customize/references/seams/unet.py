"""The seam of UNets: diffusers' IP-Adapter attention processors.

For Stable Diffusion 1.x, 2.x and XL, and AnimateDiff's motion UNet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from customize.errors import PipelineError
from customize.families import Family
from customize.families.pipeline_components import uncompiled
from customize.references.adapter import AttentionLayers, ReferenceAdapter
from customize.references.seams.attachment import (
    Attachment,
    ReferenceProjection,
    Scale,
    replace_projections,
    scale_of,
)


def attention_layers(family: Family) -> AttentionLayers:
    """Return the cross-attention layers, and the projections of all attention layers."""
    projections = family.adapter_targets(family.denoiser_key)
    attentions = family.cross_attention_layers()
    return AttentionLayers(
        {name: projections[f"{name}.to_k"][0] for name in attentions}, projections
    )


@contextmanager
def attached(denoiser: Any, adapter: ReferenceAdapter, scale: Scale = 1.0) -> Iterator[Attachment]:
    """Attach an adapter to a UNet; on exit it is as before, bit for bit.

    Args:
        denoiser: The UNet; may be compiled.
        adapter: An adapter of this UNet's layers, in any dtype, on the UNet's device. It is
            referenced, so gradients reach its parameters.
        scale: Scale of the references.

    Yields:
        The attachment, whose ``condition`` gives tokens to calls of the UNet.

    Raises:
        PipelineError: An attention layer has a processor that cannot read image tokens.
    """
    unet = uncompiled(denoiser)
    attachment = Attachment(denoiser, _insert)
    modules = {name: unet.get_submodule(name) for name in adapter.layers.attentions}
    processors = {
        name: _make_processor(module, name, adapter, attachment, scale_of(scale, name))
        for name, module in modules.items()
    }
    before = {name: module.processor for name, module in modules.items()}
    dim_type = unet.config.encoder_hid_dim_type
    with replace_projections(unet, adapter, attachment, scale):
        try:
            for name, module in modules.items():
                module.set_processor(processors[name])
            unet.encoder_hid_proj = _identity_projection()
            unet.config.encoder_hid_dim_type = "ip_image_proj"
            yield attachment
        finally:
            for name, module in modules.items():
                module.set_processor(before[name])
            # Deleted first: a module's attribute that is set to None stays among its children.
            del unet.encoder_hid_proj
            unet.encoder_hid_proj = None
            unet.config.encoder_hid_dim_type = dim_type


def _insert(arguments: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """Return a call's arguments with tokens (rows, num_tokens, width), as of one image a row."""
    tokens = tokens.to(arguments["encoder_hidden_states"])
    added = dict(arguments.get("added_cond_kwargs") or {})
    return arguments | {"added_cond_kwargs": added | {"image_embeds": [tokens[:, None]]}}


def _identity_projection() -> nn.Module:
    from diffusers.models.embeddings import MultiIPAdapterImageProjection

    return MultiIPAdapterImageProjection([nn.Identity()])


def _make_processor(
    module: Any, name: str, adapter: ReferenceAdapter, attachment: Attachment, scale: float
) -> nn.Module:
    """Return the IP-Adapter processor that equals the module's processor without image tokens."""
    from diffusers.models import attention_processor as processors

    known: dict[type, type[nn.Module]] = {
        processors.AttnProcessor2_0: processors.IPAdapterAttnProcessor2_0,
        processors.AttnProcessor: processors.IPAdapterAttnProcessor,
        processors.SlicedAttnProcessor: processors.IPAdapterAttnProcessor,
        processors.XFormersAttnProcessor: processors.IPAdapterXFormersAttnProcessor,
    }
    kind = known.get(type(module.processor))
    if kind is None:
        raise PipelineError(
            f"an attention layer has a {type(module.processor).__name__}, which cannot read "
            "reference images",
            where=name,
            fix="unload IP-Adapters, unfuse projections, or call "
            "set_default_attn_processor() on the UNet",
        )
    width = adapter.layers.attentions[name]
    processor: Any = kind(width, adapter.width, num_tokens=[], scale=[])  # without random weights
    processor.num_tokens = [0]  # read only from prompts with appended tokens
    # The values are scaled instead, by layer and by row; a scale of zero skips the tokens.
    processor.scale = [float(scale != 0.0)]
    processor.to_k_ip.append(ReferenceProjection(adapter.key(name), attachment, is_value=False))
    processor.to_v_ip.append(
        ReferenceProjection(adapter.value(name), attachment, scale, is_value=True)
    )
    return processor

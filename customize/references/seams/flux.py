"""The seam of FLUX.1: diffusers' IP-Adapter attention processor for it, in the double blocks.

The term of the reference tokens is added behind the block's output projection and gate.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from customize.errors import PipelineError
from customize.families import Family
from customize.references.adapter import AttentionLayers, ReferenceAdapter
from customize.references.seams.attachment import (
    Attachment,
    ReferenceProjection,
    Scale,
    attach,
    layers_with_keys,
)
from customize.references.seams.unet import identity_projection


def attention_layers(family: Family) -> AttentionLayers:
    """Return the attention layers of the double blocks, and the projections of all layers."""
    return layers_with_keys(family, "transformer_blocks.")


def attached(
    denoiser: Any, adapter: ReferenceAdapter, scale: Scale = 1.0
) -> AbstractContextManager[Attachment]:
    """Attach an adapter to a transformer; see :func:`customize.references.seams.unet.attached`."""
    projection = ("encoder_hid_proj", identity_projection())
    return attach(denoiser, adapter, scale, _insert, projection, _make_processor)


def _insert(arguments: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    tokens = tokens.to(arguments["encoder_hidden_states"])
    kwargs = dict(arguments.get("joint_attention_kwargs") or {})
    kwargs["ip_adapter_image_embeds"] = [tokens[:, None]]
    return arguments | {"joint_attention_kwargs": kwargs}


def _make_processor(
    module: Any, name: str, adapter: ReferenceAdapter, attachment: Attachment, scale: float
) -> nn.Module | None:
    if scale == 0.0:
        return None
    from diffusers.models.transformers.transformer_flux import (
        FluxAttnProcessor,
        FluxIPAdapterAttnProcessor,
    )

    before = module.processor
    if type(before) is not FluxAttnProcessor or module.fused_projections:
        raise PipelineError(
            f"an attention layer has a {type(before).__name__}"
            + (" and fused projections" if module.fused_projections else "")
            + ", which cannot read reference images",
            where=name,
            fix="unload IP-Adapters, or unfuse projections",
        )
    width = adapter.layers.attentions[name]
    processor: Any = FluxIPAdapterAttnProcessor(width, adapter.width, num_tokens=[], scale=[])
    processor._attention_backend = before._attention_backend
    processor._parallel_config = before._parallel_config
    processor.scale = [1.0]  # the values are scaled instead, by layer and by row
    processor.to_k_ip.append(ReferenceProjection(adapter.key(name), attachment, is_value=False))
    processor.to_v_ip.append(
        ReferenceProjection(adapter.value(name), attachment, scale, is_value=True)
    )
    return processor

"""The seam of Stable Diffusion 3: diffusers' IP-Adapter attention processor for it.

Its term attends to the image and the reference tokens together:

    out = W_o (Attn(Q, K, V) + scale * Attn(Q, [K_image, W_k' tokens], [V_image, W_v' tokens]))

Keys and values of the tokens do not depend on the timestep here, so they are computed once.
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
    per_row,
)


def attention_layers(family: Family) -> AttentionLayers:
    """Return all attention layers; those of the image alone read reference tokens as well."""
    return layers_with_keys(family)


def attached(
    denoiser: Any, adapter: ReferenceAdapter, scale: Scale = 1.0
) -> AbstractContextManager[Attachment]:
    """Attach an adapter to a transformer; see :func:`customize.references.seams.unet.attached`."""
    projection = ("image_proj", _IdentityProjection())
    return attach(denoiser, adapter, scale, _insert, projection, _make_processor)


def _insert(arguments: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    tokens = tokens.to(arguments["encoder_hidden_states"])
    kwargs = dict(arguments.get("joint_attention_kwargs") or {})
    return arguments | {"joint_attention_kwargs": kwargs | {"ip_adapter_image_embeds": tokens}}


class _IdentityProjection(nn.Module):
    """Tokens as they are, and no embedding of the timestep."""

    def forward(self, tokens: Tensor, timestep: Tensor) -> tuple[Tensor, None]:
        return tokens, None


class _NoNorm(nn.Module):
    """States as they are, whatever the embedding of the timestep."""

    def forward(self, states: Tensor, temb: Tensor | None = None) -> Tensor:
        return states


class _RowScale:
    """The processor's scale, which multiplies its term row by row."""

    def __init__(self, attachment: Attachment, scale: float) -> None:
        self._attachment, self._scale = attachment, scale

    def __ne__(self, other: object) -> bool:
        return True  # the processor leaves out its term at a scale of zero

    def __rmul__(self, output: Tensor) -> Tensor:
        current = self._attachment.current
        if current is not None and current.scale is not None:
            output = output * per_row(current.scale, output)
        return output if self._scale == 1.0 else self._scale * output


def _make_processor(
    module: Any, name: str, adapter: ReferenceAdapter, attachment: Attachment, scale: float
) -> nn.Module:
    from diffusers.models import attention_processor as processors

    known = (processors.JointAttnProcessor2_0, processors.XFormersJointAttnProcessor)
    if type(module.processor) not in known:
        raise PipelineError(
            f"an attention layer has a {type(module.processor).__name__}, which cannot read "
            "reference images",
            where=name,
            fix="unload IP-Adapters, or unfuse projections",
        )
    # Without its constructor, which draws random weights.
    processor: Any = processors.SD3IPAdapterJointAttnProcessor2_0.__new__(
        processors.SD3IPAdapterJointAttnProcessor2_0
    )
    nn.Module.__init__(processor)
    processor.norm_ip = _NoNorm()
    processor.to_k_ip = ReferenceProjection(adapter.key(name), attachment, is_value=False)
    # The term contains the image's values too, so its output is scaled instead.
    processor.to_v_ip = ReferenceProjection(adapter.value(name), attachment, is_value=False)
    processor.norm_q = nn.Identity() if module.norm_q is None else module.norm_q
    processor.norm_k = nn.Identity() if module.norm_k is None else module.norm_k
    processor.norm_ip_k = processor.norm_k
    processor.scale = _RowScale(attachment, scale) if scale else 0.0
    return processor

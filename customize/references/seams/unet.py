"""The seam of UNets: diffusers' IP-Adapter attention processors.

For Stable Diffusion 1.x, 2.x and XL, and AnimateDiff's motion UNet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from customize.errors import ConfigError, PipelineError
from customize.families import Family
from customize.families.pipeline_components import uncompiled
from customize.references.adapter import AttentionLayers, ReferenceAdapter
from customize.references.avoided_values import TextValues
from customize.references.scale import check_scales
from customize.references.seams.attachment import (
    Attachment,
    ReferenceProjection,
    Scale,
    attach,
)
from customize.text import quote

_PARTS = ("down", "mid", "up")


def attention_layers(family: Family) -> AttentionLayers:
    """Return the cross-attention layers, and the projections of all attention layers."""
    projections = family.adapter_targets(family.denoiser_key)
    attentions = family.cross_attention_layers()
    return AttentionLayers(
        {name: projections[f"{name}.to_k"][0] for name in attentions}, projections
    )


def expand_scale(family: Family, scale: Any) -> Scale:
    """Convert scales by block, as diffusers' ``set_ip_adapter_scale`` takes them.

    Args:
        family: The model.
        scale: Such as ``{"mid": 0.5, "up": {"block_0": [0.0, 1.0]}}``, with a number for each layer
            of a block; blocks without a number have 0.

    Returns:
        Name of a module -> scale.

    Raises:
        ConfigError: A block does not exist, or has another number of layers.
    """
    from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

    check_scales(scale)
    unknown = [key for key in scale if key not in _PARTS]
    if unknown:
        raise ConfigError(
            f"the scale for {quote(unknown[0])} is neither for words of reference_images= nor for "
            "a part of the UNet",
            where="reference_scale",
            fix=_scale_fix(family),
        )
    _check_blocks(family, scale)  # diffusers ignores blocks that do not exist
    try:
        (by_prefix,) = _maybe_expand_lora_scales(uncompiled(family.denoiser), [scale], 0.0)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the scales by block do not fit the UNet: {error}",
            where="reference_scale",
            fix=_scale_fix(family),
        ) from error
    numbers = dict(by_prefix)

    def scale_of_module(name: str) -> float:
        prefix = next((prefix for prefix in numbers if name.startswith(f"{prefix}.")), None)
        return 0.0 if prefix is None else float(numbers[prefix])

    return scale_of_module


def _check_blocks(family: Family, scale: Mapping[str, Any]) -> None:
    layers = [name.split(".") for name in family.cross_attention_layers()]
    blocks = {(part.removesuffix("_blocks"), f"block_{block}") for part, block, *_ in layers}
    for part in ("down", "up"):
        numbers = scale.get(part)
        for key in numbers if isinstance(numbers, Mapping) else ():
            if (part, key) not in blocks:
                raise ConfigError(
                    f"no {part} block {quote(key)} of the UNet reads references",
                    where="reference_scale",
                    fix=_scale_fix(family),
                )


def _scale_fix(family: Family) -> str:
    """Return the fix for scales by block: an example for the model's UNet."""
    fix = "give them as set_ip_adapter_scale takes them"
    layers = [name.split(".") for name in family.cross_attention_layers()]
    ups = [(block, layer) for part, block, _, layer, *_ in layers if part == "up_blocks"]
    if not ups:
        return fix
    block = ups[0][0]
    numbers = [0.5] * len({layer for number, layer in ups if number == block})
    return f'{fix}, such as {{"mid": 0.5, "up": {{"block_{block}": {numbers}}}}}'


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
    config = uncompiled(denoiser).config
    projection = ("encoder_hid_proj", identity_projection())
    with (
        attach(denoiser, adapter, scale, _insert, projection, _make_processor) as attachment,
        ExitStack() as stack,
    ):
        stack.callback(setattr, config, "encoder_hid_dim_type", config.encoder_hid_dim_type)
        config.encoder_hid_dim_type = "ip_image_proj"
        yield attachment


def _insert(arguments: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """Return a call's arguments with tokens (rows, num_tokens, width), as of one image a row."""
    tokens = tokens.to(arguments["encoder_hidden_states"])
    added = dict(arguments.get("added_cond_kwargs") or {})
    return arguments | {"added_cond_kwargs": added | {"image_embeds": [tokens[:, None]]}}


def identity_projection() -> nn.Module:
    """Return diffusers' projection of image embeddings, which leaves tokens as they are."""
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
        ReferenceProjection(
            adapter.value(name),
            attachment,
            scale,
            is_value=True,
            text_values=TextValues(module.to_v, module.heads),
        )
    )
    return processor

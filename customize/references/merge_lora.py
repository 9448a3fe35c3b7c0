"""Merging of an adapter's LoRAs into the denoiser's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from customize.errors import PipelineError
from customize.references.adapter import AttentionLayers, ReferenceAdapter


@torch.no_grad()
def merge_lora(adapter: ReferenceAdapter, denoiser: nn.Module) -> ReferenceAdapter:
    """Add an adapter's LoRAs to the weights of a denoiser, for good.

    Steps are then as fast as without LoRAs. But the denoiser is another one: it draws other
    images without references too, and the scale of references leaves the LoRAs at full strength.

    Args:
        adapter: The adapter; unchanged.
        denoiser: The denoiser, uncompiled, whose weights are changed in place. Sums are computed
            in float32.

    Returns:
        An adapter without LoRAs that shares the keys and values of the given one.

    Raises:
        PipelineError: A layer is missing, quantized, of another shape, or has concepts attached;
            nothing is changed.
    """
    merged: list[tuple[Tensor, Tensor]] = []
    updates: dict[str, Any] = adapter.updates()
    for name, update in updates.items():
        weight = _find_weight(denoiser, name, adapter.layers.projections[name])
        down, up = (w.float().to(weight.device) for w in _factors(update))
        merged.append((weight, (weight.float() + update.factor * up @ down).to(weight.dtype)))
    for weight, changed in merged:
        weight.copy_(changed)
    layers = AttentionLayers(adapter.layers.attentions, {})
    with torch.device("meta"):
        plain = ReferenceAdapter(layers, adapter.width)
    own = {name: tensor for name, tensor in adapter.state_dict().items() if "_ref." in name}
    plain.load_state_dict(own, assign=True)
    return plain.requires_grad_(requires_grad=False).eval()


def _factors(update: Any) -> tuple[Tensor, Tensor]:
    return update.lora_A.weight, update.lora_B.weight


def _find_weight(denoiser: nn.Module, name: str, shape: tuple[int, int]) -> Tensor:
    """Return the weight of a layer that a LoRA can be added to."""
    try:
        layer = denoiser.get_submodule(name)
    except AttributeError as error:
        raise PipelineError(
            "the denoiser lacks a layer of the adapter",
            where=name,
            fix="use the base that the adapter was trained on",
        ) from error
    weight = getattr(layer, "weight", None)
    if type(layer) is not nn.Linear or type(weight) is not nn.Parameter:
        raise PipelineError(
            f"LoRAs cannot be merged into a {type(layer).__name__}",
            where=name,
            fix="merge them into an unquantized denoiser, before concepts are loaded",
        )
    if tuple(weight.shape) != shape or not weight.is_floating_point():
        raise PipelineError(
            f"the layer is {tuple(weight.shape)} in {weight.dtype}, and the LoRA {shape}",
            where=name,
            fix="use the base that the adapter was trained on, unquantized",
        )
    return weight

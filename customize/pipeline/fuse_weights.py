"""Fusing updates into the base weights, and taking them out again bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from customize.concepts.base_weight import (
    LAYERWISE_CASTING,
    base_layer,
    quantizer_name,
    writable_weight,
)
from customize.concepts.merge.merge_concepts import LayerMerge
from customize.core.lowrank import add_weighted_sum, all_finite
from customize.errors import ConfigError, PipelineError
from customize.pipeline import dtype_casts
from customize.pipeline.state import WeightOriginals

#: component -> module name -> merge for the weight, computed when it is fused.
FusedUpdates = Mapping[str, Mapping[str, LayerMerge]]


@torch.no_grad()
def fuse_updates(
    models: Mapping[str, nn.Module], updates: FusedUpdates, originals: WeightOriginals
) -> None:
    """Set every fused weight to ``original + update``, and every other one to its original.

    The sum is computed in float32 on the weight's device, from the original, and rounded once to
    the weight's dtype. Apart from the originals it needs less memory than one layer's update.

    Args:
        models: component -> model.
        updates: component -> module name -> update to be in the weight.
        originals: Result of :func:`check_fused_weights`; changed along with the weights.

    Raises:
        ConfigError: A base weight is not finite, or a sum leaves the range of its dtype; the
            weights before it are changed by then.
    """
    fused = {(key, name): u for key, layers in updates.items() for name, u in layers.items()}
    for key in [key for key in originals if key not in fused]:
        layer = _base_layer(models, key)
        layer.weight.copy_(originals.pop(key))
        dtype_casts.stop_recording(layer)
    for key, update in fused.items():
        layer = _base_layer(models, key)
        weight: Tensor = layer.weight
        start = originals.get(key, weight)
        if start is weight:
            originals[key] = weight.detach().to("cpu", copy=True)
        if not all_finite(start):
            raise ConfigError(
                "the base's weight has a number that is NaN or infinite",
                where=".".join(key),
                fix="load a base whose weights are finite, such as in float32",
            )
        if weight.dtype == _sum_dtype(weight) and weight.is_contiguous():
            if start is not weight:
                weight.copy_(start)
            add_weighted_sum(weight.view(len(weight), -1), *update.summands())
        else:
            weight.copy_(_add(start.to(weight.device), update))
        dtype_casts.start_recording(layer, originals[key].dtype)
        if not all_finite(weight):
            raise ConfigError(
                f"with these weights the concepts' sum leaves the range of {weight.dtype}, mostly "
                f"by {update.largest_concept()}",
                where=".".join(key),
                fix="give smaller weights",
            )


@torch.no_grad()
def check_fused_weights(
    models: Mapping[str, nn.Module], updates: FusedUpdates, originals: WeightOriginals
) -> WeightOriginals:
    """Refuse if a fused weight is not what :func:`fuse_updates` set it to.

    Restoring the originals would else also undo what someone did to the weight since, such as
    ``fuse_lora``.

    Args:
        models: component -> model.
        updates: The updates that are fused at present.
        originals: Weights before fusing.

    Returns:
        The originals with the casts that their layers went through: after a cast to half precision
        and back, as ``from_pipe`` may do it, float32 weights have half-precision values.

    Raises:
        PipelineError: Names the first such weight.
    """
    cast_originals: WeightOriginals = {}
    for key, original in originals.items():
        layer = _base_layer(models, key)
        quantizer = quantizer_name(layer)
        if quantizer not in ("", LAYERWISE_CASTING):
            raise PipelineError(
                f"a weight with fused concepts is held by {quantizer} since",
                where=".".join(key),
                fix="load the pipeline anew, and quantize it without concepts in its weights",
            )
        casts = dtype_casts.get_casts(layer, original.dtype, ".".join(key))
        weight: Tensor = layer.weight
        expected = _add(original.to(weight.device), updates[key[0]][key[1]])
        # Another device may multiply in another order or at another precision.
        kinds = [torch.finfo(dtype) for dtype in (*casts, weight.dtype, original.dtype)]
        change = (expected - original.to(expected)).abs()
        tolerance = 2 * max(kind.eps for kind in kinds) * expected.abs() + 4e-3 * change
        # Where terms cancel, a product's error is that of its terms; and near zero, half
        # precision has steps of one size.
        tolerance += 4e-3 * change.square().mean().sqrt() + 1e-6 * expected.abs().mean()
        tolerance += 2 * max(kind.smallest_normal * kind.eps for kind in kinds)
        if bool(((weight.float() - expected).abs() > tolerance).any()):
            raise PipelineError(
                "a weight with fused concepts was changed by someone else since",
                where=".".join(key),
                fix="undo that first, for a LoRA with unfuse_lora(), or load the pipeline anew",
            )
        cast_originals[key] = dtype_casts.apply_casts(original, casts)
    return cast_originals


def check_fusable(
    models: Mapping[str, nn.Module], updates: FusedUpdates, originals: WeightOriginals
) -> None:
    """Refuse weights that cannot be fused: quantized ones, and those that layers share.

    Args:
        models: component -> model.
        updates: Updates to be fused.
        originals: Weights that are fused already are not checked again.

    Raises:
        PipelineError: Names the first such weight.
    """
    new = {
        (component, module): _base_layer(models, (component, module))
        for component, layers in updates.items()
        for module in layers
        if (component, module) not in originals
    }
    for key, layer in new.items():
        writable_weight(layer, ".".join(key))
    if not new:
        return
    targets = {id(layer): key for key, layer in new.items()}
    users = [
        (parameter, targets.get(id(module)), f"{component}.{name}")
        for component, model in models.items()
        for name, module in model.named_modules()
        for parameter in module._parameters.values()
        if type(parameter) is nn.Parameter and not parameter.is_meta and parameter.numel()
    ]
    # Sorted by their first address, parameters overlap with the next ones only.
    spans = sorted(
        ((*_address_range(parameter), target, name) for parameter, target, name in users),
        key=lambda span: span[:2],
    )
    last, owner, is_target = (-1, -1), "", False
    for device, start, stop, target, name in spans:
        if (device, start) < last and (target is not None or is_target) and name != owner:
            raise PipelineError(
                f"the weight is shared with {owner}, so that one layer's update would change both",
                where=name,
                fix="load with fuse=False, or give each layer a weight of its own",
            )
        if (device, stop) > last:
            last, owner, is_target = (device, stop), name, target is not None


def _address_range(parameter: Tensor) -> tuple[int, int, int]:
    """Return the device of a parameter, and the first and last address of its elements."""
    steps = zip(parameter.shape, parameter.stride(), strict=True)
    count = 1 + sum((side - 1) * step for side, step in steps)
    start = parameter.data_ptr()
    return parameter.get_device(), start, start + count * parameter.element_size()


def _base_layer(models: Mapping[str, nn.Module], key: tuple[str, str]) -> Any:
    """Return a layer, inside any adapter around it."""
    return base_layer(models[key[0]].get_submodule(key[1]))


def _sum_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _add(original: Tensor, update: LayerMerge) -> Tensor:
    """Return the sum as a new tensor of the original's shape, float32 or wider."""
    total = original.to(_sum_dtype(original), copy=True, memory_format=torch.contiguous_format)
    add_weighted_sum(total.view(len(total), -1), *update.summands())
    return total

"""Updates put into the base weights themselves, and taken out again bit for bit."""

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

#: component -> module -> what is to be in the weight, merged only when it is put there.
FusedUpdates = Mapping[str, Mapping[str, LayerMerge]]

# (component, module) -> the weight as it was, on the CPU, cast as the layer was since.
Originals = dict[tuple[str, str], Tensor]


@torch.no_grad()
def fuse_updates(
    models: Mapping[str, nn.Module], updates: FusedUpdates, originals: Originals
) -> None:
    """Make every fused weight ``original + update``, and every other one its original again.

    Computed in float32 on the weight's device, from the original, and rounded once to the weight's
    type. Beside the originals, which are kept, it needs less memory than one layer's update.

    Raises:
        ConfigError: a sum is too large for the weight's type; those before it are changed by then.

    Args:
        models: component -> model.
        updates: component -> module -> what is to be in the weights; empty for nothing.
        originals: what is in them now, of :func:`check_unchanged`; entries come and go as weights
            are changed.
    """
    wanted = {(key, name): u for key, layers in updates.items() for name, u in layers.items()}
    for place in [place for place in originals if place not in wanted]:
        layer = _layer(models, place)
        layer.weight.copy_(originals[place])
        dtype_casts.stop_recording(layer)
        del originals[place]
    for place, update in wanted.items():
        layer = _layer(models, place)
        weight: Tensor = layer.weight
        if place not in originals:
            originals[place] = weight.detach().to("cpu", copy=True)
            start = weight
        else:
            start = originals[place]
        if not all_finite(start):
            raise ConfigError(
                "the base's weight has a number that is NaN or infinite",
                where=".".join(place),
                fix="load a base whose weights are finite, such as in float32",
            )
        _fuse(weight, start, update)
        dtype_casts.start_recording(layer, originals[place].dtype)
        if not all_finite(weight):
            raise ConfigError(
                f"with these weights the concepts' sum leaves the range of {weight.dtype}, mostly "
                f"by {update.largest_concept()}",
                where=".".join(place),
                fix="give smaller weights",
            )


@torch.no_grad()
def check_unchanged(
    models: Mapping[str, nn.Module], updates: FusedUpdates, originals: Originals
) -> Originals:
    """Refuse where a fused weight is not what :func:`fuse_updates` made it.

    Else undoing would also undo what someone else did to it since, such as ``fuse_lora``.

    Returns:
        The originals, cast as their layers were: casting a pipeline to half precision and back, as
        ``from_pipe`` may, leaves a wide type with the values of a narrow one.

    Raises:
        PipelineError: naming the first such weight.
    """
    found = {}
    for place, original in originals.items():
        layer = _layer(models, place)
        quantizer = quantizer_name(layer)
        if quantizer not in ("", LAYERWISE_CASTING):
            raise PipelineError(
                f"a weight with fused concepts is held by {quantizer} since",
                where=".".join(place),
                fix="load the pipeline anew, and quantize it without concepts in its weights",
            )
        casts = dtype_casts.get_casts(layer, original.dtype, ".".join(place))
        weight: Tensor = layer.weight
        update = updates[place[0]][place[1]]
        expected = _fused(original.to(weight.device), update)
        # Another device may multiply in another order or at another precision.
        kinds = [torch.finfo(each) for each in (*casts, weight.dtype, original.dtype)]
        change = (expected - original.to(expected)).abs()
        allowed = 2 * max(kind.eps for kind in kinds) * expected.abs() + 4e-3 * change
        # Where terms cancel, a product's error is that of its terms; and near zero, half
        # precision has steps of one size.
        allowed += 4e-3 * change.square().mean().sqrt() + 1e-6 * expected.abs().mean()
        allowed += 2 * max(kind.smallest_normal * kind.eps for kind in kinds)
        if bool(((weight.float() - expected).abs() > allowed).any()):
            raise PipelineError(
                "a weight with fused concepts was changed by someone else since",
                where=".".join(place),
                fix="undo that first, for a LoRA with unfuse_lora(), or load the pipeline anew",
            )
        found[place] = dtype_casts.apply_casts(original, casts)
    return found


def check_fusable(
    models: Mapping[str, nn.Module], updates: FusedUpdates, originals: Originals
) -> None:
    """Refuse weights that cannot take a sum: quantized ones, and those that layers share.

    Args:
        originals: of the weights that are fused already.

    Raises:
        PipelineError: naming the first such weight.
    """
    new = {
        (key, name): _layer(models, (key, name))
        for key, layers in updates.items()
        for name in layers
        if (key, name) not in originals
    }
    for place, layer in new.items():
        writable_weight(layer, ".".join(place))
    if not new:
        return
    targets = {id(layer): place for place, layer in new.items()}
    users = [
        (parameter, targets.get(id(module)), f"{key}.{name}")
        for key, model in models.items()
        for name, module in model.named_modules()
        for parameter in module._parameters.values()
        if type(parameter) is nn.Parameter and not parameter.is_meta and parameter.numel()
    ]
    # Sorted by where they begin in memory, parameters overlap only with those that come next.
    spans = sorted(((*_span(p), target, name) for p, target, name in users), key=lambda s: s[:2])
    reach, owner, mine = (-1, -1), "", False
    for device, start, stop, target, name in spans:
        if (device, start) < reach and (target is not None or mine) and name != owner:
            raise PipelineError(
                f"the weight is shared with {owner}, so that one layer's update would change both",
                where=name,
                fix="load with fuse=False, or give each layer a weight of its own",
            )
        if (device, stop) > reach:
            reach, owner, mine = (device, stop), name, target is not None


def _span(parameter: Tensor) -> tuple[int, int, int]:
    """Device, first and last address of what a parameter covers."""
    steps = zip(parameter.shape, parameter.stride(), strict=True)
    count = 1 + sum((side - 1) * step for side, step in steps)
    start = parameter.data_ptr()
    return parameter.get_device(), start, start + count * parameter.element_size()


def _layer(models: Mapping[str, nn.Module], place: tuple[str, str]) -> Any:
    """A layer, below any adapter around it."""
    return base_layer(models[place[0]].get_submodule(place[1]))


def _fuse(weight: Tensor, start: Tensor, update: LayerMerge) -> None:
    """Make a weight the update added to its start, which may be the weight itself."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if weight.dtype == dtype and weight.is_contiguous():
        if start is not weight:
            weight.copy_(start)
        add_weighted_sum(weight.view(len(weight), -1), *update.summands())
    else:
        weight.copy_(_fused(start.to(weight.device), update))


def _fused(original: Tensor, update: LayerMerge) -> Tensor:
    """A new tensor of the original's shape, float32 or wider."""
    dtype = torch.promote_types(original.dtype, torch.float32)
    total = original.to(dtype, copy=True, memory_format=torch.contiguous_format)
    add_weighted_sum(total.view(len(total), -1), *update.summands())
    return total

"""Updates put into the base weights themselves, and taken out again bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from customize.concepts.base_weight import writable_weight
from customize.concepts.merge import Layer
from customize.core.lowrank import add_to, all_finite
from customize.errors import ConfigError, PipelineError

#: component -> module -> what is to be in the weight, merged only when it is put there.
Updates = Mapping[str, Mapping[str, Layer]]

# (component, module) -> the weight as it was, on the CPU.
Originals = dict[tuple[str, str], Tensor]


@torch.no_grad()
def fuse_updates(models: Mapping[str, nn.Module], updates: Updates, originals: Originals) -> None:
    """Make every fused weight ``original + update``, and every other one its original again.

    Computed in float32 on the weight's device, from the original, and rounded once to the weight's
    type. Beside the originals, which are kept, it needs less memory than one layer's update.

    Raises:
        ConfigError: a sum is too large for the weight's type; those before it are changed by then.

    Args:
        models: component -> model.
        updates: component -> module -> what is to be in the weights; empty for nothing.
        originals: what is in them now; entries come and go as weights are changed.
    """
    wanted = {(key, name): u for key, layers in updates.items() for name, u in layers.items()}
    for place in [place for place in originals if place not in wanted]:
        base_weight(models, place).copy_(originals[place])
        del originals[place]
    for place, update in wanted.items():
        weight = base_weight(models, place)
        if place not in originals:
            originals[place] = weight.detach().to("cpu", copy=True)
            start = weight
        else:
            start = originals[place]
        _fuse(weight, start, update)
        if not all_finite(weight):
            raise ConfigError(
                f"with these weights the concepts' sum leaves the range of {weight.dtype}",
                where=".".join(place),
                fix="give smaller weights",
            )


@torch.no_grad()
def check_unchanged(
    models: Mapping[str, nn.Module], updates: Updates, originals: Originals
) -> Originals:
    """Refuse where a fused weight is not what :func:`fuse_updates` made it.

    Else undoing would also undo what someone else did to it since, such as ``fuse_lora``.

    Returns:
        The originals, rounded as their weights were: casting a pipeline to half precision and
        back, as ``from_pipe`` may, leaves a wide type with the values of a narrow one.

    Raises:
        PipelineError: naming the first such weight.
    """
    found = {}
    for place, original in originals.items():
        weight = base_weight(models, place)
        update = updates[place[0]][place[1]]
        expected = _fused(original.to(weight.device), update)
        # Rounded twice where the pipeline's dtype was changed in between; and another device
        # may multiply in another order or at another precision.
        narrow = _narrowest(weight)
        kinds = [torch.finfo(each) for each in (narrow, original.dtype)]
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
        found[place] = original if narrow == weight.dtype else original.to(narrow)
    return found


def check_fusable(models: Mapping[str, nn.Module], updates: Updates) -> None:
    """Refuse weights that cannot take a sum, such as quantized ones.

    Raises:
        PipelineError: naming the first such weight.
    """
    for key, layers in updates.items():
        for name in layers:
            base_weight(models, (key, name))


def base_weight(models: Mapping[str, nn.Module], place: tuple[str, str]) -> Tensor:
    """The (out, in) weight of a layer, below any adapter around it, to be changed in place.

    Raises:
        PipelineError: it is quantized, or no parameter.
    """
    return writable_weight(models[place[0]].get_submodule(place[1]), ".".join(place))


def _narrowest(weight: Tensor) -> torch.dtype:
    """The narrowest of the types that hold these values exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        if dtype.itemsize < weight.dtype.itemsize and torch.equal(
            weight, weight.to(dtype).to(weight)
        ):
            return dtype
    return weight.dtype


def _fuse(weight: Tensor, start: Tensor, update: Layer) -> None:
    """Make a weight the update added to its start, which may be the weight itself."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if weight.dtype == dtype and weight.is_contiguous():
        if start is not weight:
            weight.copy_(start)
        add_to(weight.view(len(weight), -1), *update.parts())
    else:
        weight.copy_(_fused(start.to(weight.device), update))


def _fused(original: Tensor, update: Layer) -> Tensor:
    """A new tensor of the original's shape, float32 or wider."""
    dtype = torch.promote_types(original.dtype, torch.float32)
    total = original.to(dtype, copy=True, memory_format=torch.contiguous_format)
    add_to(total.view(len(total), -1), *update.parts())
    return total

"""Decoding the tensors of one layer to its update, by the format that matches them."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import torch
from torch import Tensor

from customize.concepts.formats import decoders
from customize.concepts.formats.decoders.decode_lora import LORA, wrong_initialization
from customize.concepts.formats.decoders.update_format import LayerTensors, Scale, UpdateFormat
from customize.concepts.formats.peft_config import Config, subtracted_initialization
from customize.concepts.formats.tensor_group import TensorGroup
from customize.core.lowrank import LowRank, all_finite
from customize.errors import ConceptError

NO_CONFIG: Config = MappingProxyType({})


def find_format(group: TensorGroup) -> UpdateFormat | None:
    """The first format of the registry that matches the parts of a layer, or None."""
    parts = group.parts.keys()
    return next((entry for entry in decoders.FORMATS if entry.matches(parts)), None)


def needs_base_weight(group: TensorGroup) -> bool:
    """Whether the update depends on the weight that it changes, such as DoRA, OFT and BOFT."""
    update_format = find_format(group)
    return update_format is not None and update_format.needs_base_weight


def decode_update(
    group: TensorGroup, scale: Scale, weight: Callable[[], Tensor], config: Config = NO_CONFIG
) -> LowRank:
    """Decode the update of a layer.

    Args:
        group: The tensors of the layer, without its changes of biases and norms.
        scale: Rank -> factor, for files that store no alpha with the layer.
        weight: Returns the base weight without adapters, float32, (out, in) or (out, in, *kernel);
            called only for formats that need it.
        config: The adapter's peft configuration.

    Returns:
        The update of the weight, flattened to (out, in * kernel), exact but for one rounding to
        float32. Formats that need the base weight give its dense change at full strength.

    Raises:
        ConceptError: If parts are missing, superfluous, not finite, or of shapes that do not fit.
    """
    parts = {part: _check_tensor(group, part) for part in group.parts}
    alpha = None
    if "alpha" in parts:
        alpha = _check_alpha(group, parts.pop("alpha"))
        scale = _scale_by_alpha(alpha)
    initialization = subtracted_initialization(config)
    if initialization is not None and "down" not in group.parts:
        raise wrong_initialization(initialization)
    return _decode(LayerTensors(group, parts, alpha, scale, weight, config, _decode))


def visible_shape(group: TensorGroup) -> tuple[int | None, int | None]:
    """(out, in) of the update, as far as the tensors show it; None for a side that they do not."""
    shapes = {part: tuple(tensor.shape) for part, tensor in group.parts.items() if tensor.ndim > 1}
    for update_format in decoders.FORMATS:
        out, width = update_format.shape(shapes)
        if out is not None or width is not None:
            return out, width
    return None, None


def visible_rank(group: TensorGroup) -> int | None:
    """The rank that alpha is divided by, or None if the tensors show none."""
    for update_format in decoders.FORMATS:
        for part in update_format.rank_parts:
            if part in group.parts and group.parts[part].ndim:
                return group.parts[part].shape[0]
    return None


def _decode(layer: LayerTensors) -> LowRank:
    parts = layer.parts.keys()
    matching = (entry for entry in decoders.FORMATS if entry.matches(parts))
    return next(matching, LORA).decode(layer)


def _scale_by_alpha(alpha: float) -> Scale:
    return lambda rank: alpha / rank if rank else 1.0


def _check_tensor(group: TensorGroup, part: str) -> Tensor:
    """The tensor of a part, in float32, float16 or bfloat16.

    Raises:
        ConceptError: If it is empty, not finite, not of floating type, or not a matrix.
    """
    is_scalar = part == "alpha" or any(part in f.scalar_parts for f in decoders.FORMATS)
    is_vector = any(part in f.vector_parts for f in decoders.FORMATS)
    tensor = group.parts[part]
    if not tensor.is_floating_point() and not is_scalar:
        raise ConceptError(f"{group.keys[part]} has numbers of type {tensor.dtype}")
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        tensor = tensor.to(torch.float32)
    if not all_finite(tensor):
        raise ConceptError(f"{group.keys[part]} has a number that is NaN or infinite")
    if not is_scalar and (tensor.numel() == 0 or tensor.ndim == 0):
        raise ConceptError(f"{group.keys[part]} is empty")
    if tensor.ndim < 2 and not is_scalar and not is_vector:
        raise ConceptError(f"{group.keys[part]} of shape {tuple(tensor.shape)} is not a matrix")
    return tensor


def _check_alpha(group: TensorGroup, tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise ConceptError(f"{group.keys['alpha']} is not one number")
    return float(tensor)

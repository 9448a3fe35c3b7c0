"""Parts of a picture as users give them: boxes and masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from customize.core.region_weights import box_weights, mask_weights
from customize.core.scalars import as_float
from customize.errors import ConfigError
from customize.text import quote

# (rows, columns) -> weights of that shape, in [0, 1].
WeightFunction = Callable[[int, int], Tensor]

_MAX_MASK_PIXELS = 2**28


def weight_function(area: Any, where: str) -> WeightFunction:
    """Convert a box or a mask to weights on any grid.

    Args:
        area: A box (left, top, right, bottom) in fractions of the picture, or a mask of (height,
            width) with values from 0 to 1.
        where: Its argument, for errors.

    Raises:
        ConfigError: It is neither.
    """
    if isinstance(area, Image.Image | Tensor | np.ndarray):
        mask = _read_mask(area, where)
    elif isinstance(area, Sequence) and not isinstance(area, str):
        return partial(box_weights, _read_box(area, where))
    else:
        raise ConfigError(
            f"a region cannot be a {type(area).__name__}",
            where=where,
            fix="give a box (left, top, right, bottom), or a mask: a PIL image, array or tensor",
        )
    if not bool(torch.isfinite(mask).all()):
        raise ConfigError("the mask is not finite", where=where)
    if float(mask.min()) < 0.0 or float(mask.max()) > 1.0:
        raise ConfigError(
            f"the mask has values from {float(mask.min()):g} to {float(mask.max()):g}",
            where=where,
            fix="scale it to 0 (outside) to 1 (inside)",
        )
    if not bool(mask.any()):
        raise ConfigError("the mask is empty", where=where, fix="set it to 1 in the region")
    return partial(mask_weights, mask)


def _read_mask(area: Image.Image | Tensor | np.ndarray[Any, Any], where: str) -> Tensor:
    """Convert a mask to a tensor (height, width), float32, on the CPU."""
    if isinstance(area, Tensor) and area.is_nested:
        raise ConfigError("a mask cannot be a nested tensor", where=where)
    shape = tuple(area.size[::-1] if isinstance(area, Image.Image) else area.shape)
    if len(shape) != 2 or not 0 < math.prod(shape) <= _MAX_MASK_PIXELS:
        raise ConfigError(
            f"a mask of shape {shape} is not (height, width) of at most {_MAX_MASK_PIXELS:,} "
            "pixels",
            where=where,
            fix="give one number for each pixel",
        )
    try:
        if isinstance(area, Image.Image):
            return torch.from_numpy(np.array(area.convert("L"), dtype=np.float32) / 255)
        if isinstance(area, Tensor):
            if area.is_complex() or area.is_quantized or area.layout != torch.strided:
                raise TypeError("its numbers are complex, quantized or sparse")
            return area.detach().cpu().float()
        if area.dtype.kind not in "biuf":
            raise TypeError(f"its elements are of type {area.dtype}")
        with np.errstate(over="ignore"):  # infinite after overflow, which is refused as above 1
            return torch.from_numpy(np.ascontiguousarray(area).astype(np.float32))
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the mask cannot be read: {error}",
            where=where,
            fix="give real numbers from 0 to 1, or a grayscale image",
        ) from error


def _read_box(area: Sequence[Any], where: str) -> tuple[float, float, float, float]:
    numbers = [as_float(number) for number in area] if len(area) == 4 else [math.nan]
    if any(map(math.isnan, numbers)):
        raise ConfigError(
            f"invalid box {quote(area)}",
            where=where,
            fix="give four numbers: left, top, right, bottom",
        )
    left, top, right, bottom = numbers
    if min(left, top) < 0.0 or max(right, bottom) > 1.0:
        raise ConfigError(
            f"the box {tuple(area)} exceeds the image",
            where=where,
            fix="give fractions of its width and height, from 0 to 1, not pixels",
        )
    if left >= right or top >= bottom:
        raise ConfigError(
            f"the box {tuple(area)} is empty",
            where=where,
            fix="give left, top, right, bottom, in this order",
        )
    return left, top, right, bottom

"""Regions of an image as weights on a grid, and predictions blended by them (arXiv 2302.08113).

A grid of (height, width) cells covers the whole image; a cell is a pixel, a latent or a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from customize.core.precision import full_precision

Box = tuple[float, float, float, float]

#: Width of the soft edge of a box, as a fraction of the image's width or height.
EDGE = 0.1

# Smaller weights are rounding errors.
_WEIGHT_TOLERANCE = 1e-6


@full_precision()
def box_weights(box: Box, height: int, width: int, edge: float = EDGE) -> Tensor:
    """Return the share of each cell that a box with soft edges covers.

    Along each axis the weight rises linearly from 0 to 1 around the box's edge; an edge on the
    border of the image is hard. A box narrower than the soft edge keeps its area.

    Args:
        box: (left, top, right, bottom) as fractions of the image, in [0, 1].
        height: Rows of the grid.
        width: Columns of the grid.
        edge: The width of the soft edge, as a fraction of the image; 0 for hard edges.

    Returns:
        (height, width), float32, in [0, 1].
    """
    left, top, right, bottom = box
    across = _axis_weights(width, left, right, edge)
    return _axis_weights(height, top, bottom, edge)[:, None] * across


@full_precision()
def mask_weights(mask: Tensor, height: int, width: int) -> Tensor:
    """Return the mean of a mask over each cell.

    Args:
        mask: (rows, columns), any floating dtype, in [0, 1].
        height: Rows of the grid.
        width: Columns of the grid.

    Returns:
        (height, width), float32, in [0, 1].
    """
    pooled = functional.interpolate(mask.float()[None, None], (height, width), mode="area")
    return pooled[0, 0].clamp(0.0, 1.0)


def region_window(weights: Tensor, multiple: int = 1) -> tuple[slice, slice]:
    """Return the part of the image in which a region is drawn: the cells with a weight.

    It has at least half of the image's height and width, as models draw badly in small windows.

    Args:
        weights: (rows, columns), not 0 everywhere.
        multiple: The window's sides are multiples of it, or all of the image's side.

    Returns:
        The window's rows and columns.
    """
    shown = weights > 0
    return _axis_window(shown.any(1), multiple), _axis_window(shown.any(0), multiple)


def _axis_window(shown: Tensor, multiple: int) -> slice:
    cells, indices = len(shown), shown.nonzero()[:, 0]
    low, high = int(indices[0]), int(indices[-1]) + 1
    side = max(high - low, -(-cells // 2))
    side = min(cells, -(-side // multiple) * multiple)
    start = min(max(0, (low + high - side) // 2), cells - side)
    return slice(start, start + side)


def stack_regions(weights: Sequence[Tensor]) -> list[Tensor]:
    """Stack regions: a later region covers earlier ones, and the background fills the remainder.

    Where the soft edges of adjacent boxes meet, their weights still add up to 1.

    Args:
        weights: One tensor (height, width) in [0, 1] for each region.

    Returns:
        The weights of the background and of each region, which add up to 1 in every cell.
    """
    remaining = torch.ones_like(weights[0])
    stacked: list[Tensor] = []
    for region in reversed(weights):
        visible = torch.minimum(region, remaining)
        remaining = remaining - visible
        remaining = torch.where(remaining < _WEIGHT_TOLERANCE, 0.0, remaining)
        stacked.insert(0, visible)
    return [remaining, *stacked]


@full_precision()
def blend(predictions: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return the weighted sum; exactly one of the predictions where its weight is 1.

    Args:
        predictions: Tensors of one shape and floating dtype.
        weights: One for each prediction, broadcastable to it; they add up to 1.

    Returns:
        The predictions' shape and dtype; computed in float32.
    """
    total = torch.zeros_like(predictions[0], dtype=torch.float32)
    for prediction, weight in zip(predictions, weights, strict=True):
        # 0 * NaN is NaN: cells without weight must not receive what is not finite.
        total = total + torch.where(weight > 0, weight * prediction.float(), 0.0)
    return total.to(predictions[0].dtype)


def _axis_weights(cells: int, low: float, high: float, edge: float) -> Tensor:
    """Return the mean of a trapezoid over each cell of [0, 1]: (cells,), float32."""
    bounds = torch.linspace(0.0, 1.0, cells + 1, dtype=torch.float64)
    integral = _ramp_integral(bounds, low, edge if low > 0.0 else 0.0)
    integral = integral - _ramp_integral(bounds, high, edge if high < 1.0 else 0.0)
    return (integral.diff() * cells).clamp(0.0, 1.0).float()


def _ramp_integral(x: Tensor, center: float, edge: float) -> Tensor:
    """Integrate a ramp of width ``edge`` around ``center`` from -infinity to x."""
    distance = (x - (center - edge / 2)).clamp(min=0.0)
    return torch.where(distance < edge, distance.square() / (2 * edge), distance - edge / 2)

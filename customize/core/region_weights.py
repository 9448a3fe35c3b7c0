"""Regions of a picture as weights on any grid, and answers put together by them (arXiv 2302.08113).

A grid of (height, width) cells covers the whole picture, however fine: a cell is a pixel,
a latent or a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from customize.core.precision import full_precision

Box = tuple[float, float, float, float]

#: How wide the soft edge of a box is, as a share of the picture's width or height.
EDGE = 0.1

# Of weights that add up to 1: so much is none.
_WEIGHT_TOLERANCE = 1e-6


@full_precision()
def box_weights(box: Box, height: int, width: int, edge: float = EDGE) -> Tensor:
    """How much of each cell a box with soft edges holds.

    Along each axis the weight rises from 0 to 1 on a straight line, centred on the box's edge; an
    edge on the picture's border is hard. A box narrower than the soft edge keeps its area.

    Args:
        box: (left, top, right, bottom) as shares of the picture, in [0, 1].
        edge: the width of the line, as a share of the picture's; 0 for hard edges.

    Returns:
        (height, width), float32, in [0, 1].
    """
    left, top, right, bottom = box
    across = _axis_weights(width, left, right, edge)
    return _axis_weights(height, top, bottom, edge)[:, None] * across


@full_precision()
def mask_weights(mask: Tensor, height: int, width: int) -> Tensor:
    """The mean of a mask over each cell.

    Args:
        mask: (rows, columns), in [0, 1].

    Returns:
        (height, width), float32, in [0, 1].
    """
    pooled = functional.interpolate(mask.float()[None, None], (height, width), mode="area")
    return pooled[0, 0].clamp(0.0, 1.0)


def stack_regions(weights: Sequence[Tensor]) -> list[Tensor]:
    """Regions on top of one another: the later one wins, the earlier one keeps what it leaves.

    Where two soft edges meet, as of boxes side by side, their sum stays 1.

    Args:
        weights: of each region, all (height, width), in [0, 1].

    Returns:
        The background's, and those of each region; they add up to 1 in every cell.
    """
    rest = torch.ones_like(weights[0])
    found: list[Tensor] = []
    for own in reversed(weights):
        taken = torch.minimum(own, rest)
        rest = rest - taken
        rest = torch.where(rest < _WEIGHT_TOLERANCE, 0.0, rest)
        found.insert(0, taken)
    return [rest, *found]


@full_precision()
def blend(answers: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The weighted sum of answers; where one has all the weight, it is that one bit for bit.

    Args:
        answers: equal in shape.
        weights: one for each, broadcastable to it; they add up to 1.

    Returns:
        (...), the dtype of the answers.
    """
    total = torch.zeros_like(answers[0], dtype=torch.float32)
    for answer, weight in zip(answers, weights, strict=True):
        # Not by multiplying alone: what is not finite elsewhere must stay there.
        total = total + torch.where(weight > 0, weight * answer.float(), 0.0)
    return total.to(answers[0].dtype)


def _axis_weights(cells: int, low: float, high: float, edge: float) -> Tensor:
    """(cells,): the mean of a trapezoid over each cell of [0, 1]."""
    bounds = torch.linspace(0.0, 1.0, cells + 1, dtype=torch.float64)
    integral = _ramp_integral(bounds, low, edge if low > 0.0 else 0.0)
    integral = integral - _ramp_integral(bounds, high, edge if high < 1.0 else 0.0)
    return (integral.diff() * cells).clamp(0.0, 1.0).float()


def _ramp_integral(x: Tensor, at: float, edge: float) -> Tensor:
    """The integral, from -infinity to x, of a step at ``at`` that takes ``edge`` to rise."""
    if edge == 0.0:
        return (x - at).clamp(min=0.0)
    begun = (x - (at - edge / 2)).clamp(min=0.0)
    return torch.where(begun < edge, begun.square() / (2 * edge), begun - edge / 2)

"""Slices that don't fire on what all prompts share.

Disjoint slices make one update orthogonal to another, but each still answers to the directions that
every prompt has in common, which hold nearly all of a layer's input. So a slice is taken from the
directions that are left, and what of it generic prompts reach nevertheless is held down in
training::

    sum_l  E ||s U_l D_l x||^2 / E ||W_l x||^2      over inputs x of generic prompts

Inputs are known by the factor S of their second moment, of trace 1, as
:meth:`customize.core.input_moment.InputMoment.factor` gives it: its rows are the leading
directions, strongest first, each as long as the root of its share.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from customize.core.bases import Basis, Columns, complement_projection, count_shared_directions
from customize.core.precision import full_precision

# No slice is louder than this: where next to nothing is left, it would be noise that is amplified.
_MAX_ROW_LENGTH = 10.0


def residual_energy(inputs: Tensor, avoid: int) -> float:
    """The share of the inputs' energy that lies outside of the avoided directions, 0 to 1."""
    count = count_shared_directions(inputs.shape[1], avoid)
    return max(1.0 - float(inputs[:count].double().square().sum()), 0.0)


@full_precision()
def captured_energy(inputs: Tensor, directions: Tensor) -> float:
    """The share of the inputs' energy that lies in the span of some directions.

    It does not depend on the directions' signs, order or lengths, nor on how directions of nearly
    equal energy are turned among one another, which rounding decides.

    Args:
        inputs: (n, width), the factor of a layer's inputs.
        directions: (k, width), linearly independent.

    Returns:
        0 to 1.
    """
    if not len(directions):
        return 0.0
    span, _ = torch.linalg.qr(directions.double().T)
    return float((inputs.double() @ span).square().sum())


@full_precision()
def scaled_down_projection(
    basis: Basis, inputs: Tensor, columns: Columns, seed: int, *, avoid: int, scale: float = 1.0
) -> Tensor:
    """The frozen down-projection of a layer with such inputs.

    It is as long as makes generic inputs as loud in it as they are in a slice that avoids nothing,
    on average: otherwise the up-projection would have to grow, and learn longer, by that much.

    Args:
        inputs: (n, width), the factor of the layer's inputs on generic prompts.
        columns: of the basis of the width less
            :func:`customize.core.bases.count_shared_directions`.
        avoid: leading directions to avoid, at most.
        scale: over that length.

    Returns:
        (len(columns), width), float32.

    Raises:
        ConfigError: as the basis.
    """
    width = inputs.shape[1]
    lead = inputs[: count_shared_directions(width, avoid)]
    rest = residual_energy(inputs, avoid) / (width - len(lead))
    length = _MAX_ROW_LENGTH if rest <= 0 else min(math.sqrt(1 / width / rest), _MAX_ROW_LENGTH)
    return complement_projection(basis, lead, columns, seed, scale * length)


@full_precision()
def relative_output_change(down: Tensor, inputs: Tensor, weight: Tensor, scale: float) -> float:
    """What an up-projection of norm 1 changes of a layer's output on generic prompts, on average.

    Args:
        down: (r, width), the update's.
        inputs: (n, width), the factor of the layer's inputs on generic prompts. What it leaves out
            counts as spread evenly.
        weight: (out, width), the layer's.
        scale: of the update.

    Returns:
        ``E ||s D x||^2 / (r E ||W x||^2)``: times the up-projection's squared norm it is the share
        of the output's energy that the update changes.
    """
    width = inputs.shape[1]
    rows = inputs.to(device=weight.device, dtype=torch.float32)
    unseen = max(1.0 - float(rows.square().sum()), 0.0) / width

    def energy(matrix: Tensor) -> float:
        plain = matrix.detach().to(rows)
        return float((plain @ rows.T).square().sum() + unseen * plain.square().sum())

    whole = energy(weight)
    return scale**2 * energy(down) / (len(down) * whole) if whole > 0 else 0.0

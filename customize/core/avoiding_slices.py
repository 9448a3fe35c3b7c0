"""Slices orthogonal to the directions common to all prompts.

Disjoint slices make updates orthogonal to one another, but every update still responds to the
directions that all prompts share, which contain nearly all energy of a layer's input. So slices
are taken from the complement of these directions, and training adds a penalty for the output that
an update nevertheless changes on generic prompts::

    sum_l  E ||s U_l D_l x||^2 / E ||W_l x||^2      over inputs x of generic prompts

Inputs are given as a factor S of their second moment ``S^T S``, of trace 1, as from
:meth:`customize.core.input_moment.InputMoment.factor`: its rows are the leading directions by
decreasing energy, and the squared length of a row is its share of the energy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from customize.core.bases import Basis, Columns, complement_projection, count_shared_directions
from customize.core.precision import full_precision

# Limits the rows' length where almost no energy is left, so that noise is not amplified.
_MAX_ROW_LENGTH = 10.0


def residual_energy(inputs: Tensor, avoid: int) -> float:
    """Return the share of the inputs' energy outside the avoided directions, from 0 to 1.

    Args:
        inputs: (n, width), the factor of a layer's inputs, floating point.
        avoid: The number of directions to avoid; see
            :func:`customize.core.bases.count_shared_directions`.
    """
    count = count_shared_directions(inputs.shape[1], avoid)
    return max(1.0 - float(inputs[:count].double().square().sum()), 0.0)


@full_precision()
def captured_energy(inputs: Tensor, directions: Tensor) -> float:
    """Return the share of the inputs' energy in the span of some directions, from 0 to 1.

    The result depends on the span only: not on signs, order or lengths of the directions, nor on
    rotations among directions of nearly equal energy, which are up to rounding.

    Args:
        inputs: (n, width), the factor of a layer's inputs, floating point.
        directions: (k, width), linearly independent; k may be 0.
    """
    if not len(directions):
        return 0.0
    span, _ = torch.linalg.qr(directions.double().T)
    return float((inputs.double() @ span).square().sum())


@full_precision()
def scaled_down_projection(
    basis: Basis, inputs: Tensor, columns: Columns, seed: int, *, avoid: int, scale: float = 1.0
) -> Tensor:
    """Return the frozen down-projection of a slice that avoids the inputs' leading directions.

    Its rows are scaled so that the mean energy of generic inputs in the slice is that of a slice
    which avoids nothing. Otherwise the up-projection would have to grow by that factor, and train
    longer.

    Args:
        basis: The orthogonal basis.
        inputs: (n, width), the factor of the layer's inputs on generic prompts.
        columns: Column numbers of the basis of the width minus
            :func:`customize.core.bases.count_shared_directions`.
        seed: Seed of the basis, in [0, 2**64).
        avoid: The largest number of leading directions to avoid.
        scale: Multiplies the rows' length.

    Returns:
        (len(columns), width), float32.

    Raises:
        ConfigError: As the basis.
    """
    width = inputs.shape[1]
    lead = inputs[: count_shared_directions(width, avoid)]
    energy = residual_energy(inputs, avoid) / (width - len(lead))  # of one remaining direction
    length = _MAX_ROW_LENGTH
    if energy > 0:
        length = min(math.sqrt(1 / width / energy), _MAX_ROW_LENGTH)
    return complement_projection(basis, lead, columns, seed, scale * length)


@full_precision()
def relative_output_change(down: Tensor, inputs: Tensor, weight: Tensor, scale: float) -> float:
    """Return the mean relative change of a layer's output that an up-projection of norm 1 causes.

    Args:
        down: (r, width), the down-projection, floating point.
        inputs: (n, width), the factor of the layer's inputs on generic prompts. Energy that the
            factor does not contain is assumed to be spread evenly over all directions.
        weight: (out, width), the layer's weight.
        scale: The scale of the update.

    Returns:
        ``E ||s D x||^2 / (r E ||W x||^2)``; 0 for a weight of zeros. The product with the
        up-projection's squared norm is the share of the output's energy that the update changes.
    """
    width = inputs.shape[1]
    rows = inputs.to(device=weight.device, dtype=torch.float32)
    unseen = max(1.0 - float(rows.square().sum()), 0.0) / width

    def energy(matrix: Tensor) -> float:
        exact = matrix.detach().to(rows)
        return float((exact @ rows.T).square().sum() + unseen * exact.square().sum())

    output = energy(weight)
    return scale**2 * energy(down) / (len(down) * output) if output > 0 else 0.0

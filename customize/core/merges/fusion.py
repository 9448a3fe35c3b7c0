"""Fusion: the least-squares update that reproduces each concept on its own inputs.

A sum applies every update to every input. Fusion solves for one update of the layer that changes
the inputs of each concept as the concept's own update does (the objective of gradient fusion,
Mix-of-Show, arXiv 2305.18292, eq. 4), and leaves the inputs of generic prompts unchanged::

    min over dW:  sum_i tr((dW - w_i dW_i) C_i (dW - w_i dW_i)^T)
                  + tr(dW C_0 dW^T) + ridge ||dW||^2

C_i is the second moment of the inputs of concept i, of trace 1, and C_0 that of the inputs to
preserve. The problem is quadratic and has a closed form::

    dW = sum_i w_i dW_i C_i A^-1,    A = sum_i C_i + C_0 + ridge I

Each ``dW_i C_i A^-1`` has the up-projection of ``dW_i``, so that the merge is an ordinary LoRA
whose rank is the sum of the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from customize.core.lowrank import LowRank, check_mergeable, common_dtype, weighted_sum
from customize.core.merges.method import MergeMethod, RecordedInputs
from customize.core.precision import full_precision
from customize.errors import ConceptError, ConfigError

# Chosen on storybook concepts that are in no benchmark: results are equal from 3e-5 to 3e-4, and
# worsen from 1e-3 on.
RIDGE = 1e-4

# Weight of each record's generic moment in C_0, relative to the moment of one concept.
GENERIC_WEIGHT = 0.1


@full_precision()
def fusion(
    updates: Sequence[LowRank],
    weights: Sequence[float],
    inputs: Sequence[Tensor],
    preserved: Tensor | None = None,
    ridge: float = RIDGE,
) -> LowRank:
    """Solve for the update that reproduces each concept's update on the concept's own inputs.

    Args:
        updates: K >= 1 updates of one weight, all of one shape (out, in) and on one device.
        weights: K finite numbers. A concept of weight 0 adds nothing, and its inputs are preserved.
        inputs: K factors S_i of shape (n_i, in) with ``C_i = S_i^T S_i``, as
            :meth:`customize.core.input_moment.InputMoment.factor` returns them.
        preserved: A factor of C_0, of shape (n, in); None for no such inputs.
        ridge: Above 0: the share of a concept's energy above which a direction counts.

    Returns:
        An update of scale 1 whose rank is the sum of the ranks, in float32 or the factors' higher
        precision.

    Raises:
        ConceptError: If shapes or devices differ.
        ConfigError: If the numbers of updates, weights and inputs differ, or the ridge is not
            positive and finite.
    """
    check_mergeable(updates, weights)
    if len(inputs) != len(updates):
        raise ConfigError(
            f"{len(updates)} updates need the inputs of as many concepts, not of {len(inputs)}",
            fix="give the inputs of each concept",
        )
    if not (math.isfinite(ridge) and ridge > 0):
        raise ConfigError(f"invalid ridge {ridge}", fix="give a number above 0")
    width = updates[0].shape[1]
    factors = [*inputs, *([] if preserved is None else [preserved])]
    for factor in factors:
        if factor.ndim != 2 or factor.shape[1] != width:
            raise ConceptError(
                f"inputs of shape {tuple(factor.shape)} do not fit a layer of width {width}",
                fix="give factors of recorded inputs of this layer",
            )
    device, dtype = updates[0].up.device, common_dtype(updates)
    exact = [factor.to("cpu", torch.float64) for factor in factors]
    solved = _times_inverse(torch.cat(exact), ridge).split([len(factor) for factor in exact])
    ups, downs = [], []
    for update, weight, rows, solved_rows in zip(updates, weights, exact, solved, strict=False):
        ups.append((weight * update.scale) * update.up.to(dtype))
        down = (update.down.to("cpu", torch.float64) @ rows.T) @ solved_rows
        downs.append(down.to(device, dtype))
    return LowRank(torch.cat(ups, dim=1), torch.cat(downs))


def fuse_recorded(
    updates: Sequence[LowRank], weights: Sequence[float], inputs: RecordedInputs
) -> LowRank:
    """Fuse the updates whose inputs were recorded, and add the others.

    C_0 is the sum of the preserved moments and of :data:`GENERIC_WEIGHT` times each generic one.

    Args:
        updates: At least one update of one weight, all of one shape (out, in).
        weights: As many finite numbers.
        inputs: As many factors; see :class:`RecordedInputs`.

    Returns:
        As :func:`fusion`; the weighted sum if no inputs of the layer were recorded.

    Raises:
        ConceptError: As :func:`fusion`.
        ConfigError: As :func:`fusion`.
    """
    check_mergeable(updates, weights)
    recorded = {
        index: factor
        for index, factor in enumerate(inputs.concepts)
        if factor is not None and updates[index].rank
    }
    if not recorded:
        return weighted_sum(updates, weights)
    # C_0 is linear in the moments, and a moment is quadratic in its factor.
    factors = [
        *inputs.preserved,
        *(factor * math.sqrt(GENERIC_WEIGHT) for factor in inputs.generic),
    ]
    fused = fusion(
        [updates[index] for index in recorded],
        [weights[index] for index in recorded],
        list(recorded.values()),
        torch.cat(factors) if factors else None,
    )
    others = [index for index in range(len(updates)) if index not in recorded]
    return weighted_sum(
        [fused, *(updates[index] for index in others)],
        [1.0, *(weights[index] for index in others)],
    )


def _times_inverse(rows: Tensor, ridge: float) -> Tensor:
    """``S (S^T S + ridge I)^-1`` of (n, width) rows S, solved on the smaller of the two sides."""
    n, width = rows.shape
    if n <= width:
        gram = rows @ rows.T + ridge * torch.eye(n, dtype=rows.dtype)
        return torch.cholesky_solve(rows, torch.linalg.cholesky(gram))
    moment = rows.T @ rows + ridge * torch.eye(width, dtype=rows.dtype)
    return torch.cholesky_solve(rows.T.contiguous(), torch.linalg.cholesky(moment)).T


FUSION = MergeMethod(
    name="fusion",
    summary="the least-squares update that reproduces each concept on its own inputs,"
    " as recorded by customize record",
    merge=fuse_recorded,
    min_concepts=1,
    needs_inputs=True,
    is_separable=True,
)

"""Pruning of dense updates, which the methods magnitude, DARE and TIES share.

They prune the entries of the product ``scale * up @ down``, never those of the factors: an entry
that is small in a factor may be large in the product. Their result is dense and exact;
:func:`customize.core.truncation.truncate_randomized` gives a low-rank approximation of it. They
keep a handful of dense (out, in) matrices in memory, however many updates there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from customize.core.lowrank import LowRank, common_dtype
from customize.core.merges.method import Setting

#: The least fraction of entries; DARE divides by it.
MIN_DENSITY = 1e-6


def density_setting(default: float) -> Setting:
    """The setting ``density``: the fraction of entries that pruning keeps."""
    return Setting(
        name="density",
        help="Fraction of entries kept",
        default=default,
        minimum=MIN_DENSITY,
        maximum=1.0,
    )


def dense_updates(updates: Sequence[LowRank], weights: Sequence[float]) -> Iterator[Tensor]:
    """Yield ``weights[i] * updates[i]`` as (out, in) matrices, one at a time.

    They are float32, or of the higher precision of the factors.
    """
    dtype = common_dtype(updates)
    for update, weight in zip(updates, weights, strict=True):
        yield (weight * update.scale) * (update.up.to(dtype) @ update.down.to(dtype))


def keep_largest(entries: Tensor, density: float) -> Tensor:
    """Set all but the largest entries by magnitude to zero.

    Args:
        entries: Any shape.
        density: Fraction of the entries kept, in (0, 1]; at least one is kept, and so are those
            that tie with the smallest one kept.
    """
    magnitudes = entries.abs().flatten()
    count = max(round(density * len(magnitudes)), 1)
    if count >= len(magnitudes):
        return entries
    threshold = magnitudes.kthvalue(len(magnitudes) - count + 1).values
    return torch.where(entries.abs() >= threshold, entries, 0.0)


def sum_in_place(matrices: Iterator[Tensor]) -> Tensor:
    """Sum matrices, accumulating in the memory of the first."""
    total = next(matrices)
    for matrix in matrices:
        total += matrix
    return total

"""TIES: the mean of pruned updates over those that agree in sign (arXiv 2306.01708)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from customize.core.lowrank import LowRank, check_mergeable, from_dense
from customize.core.merges.method import MergeMethod
from customize.core.merges.pruning import dense_updates, density_setting, keep_largest
from customize.core.precision import full_precision

DEFAULT_DENSITY = 0.2
DENSITY = density_setting(DEFAULT_DENSITY)


@full_precision()
def ties(
    updates: Sequence[LowRank], weights: Sequence[float], *, density: float = DEFAULT_DENSITY
) -> LowRank:
    """Trim, elect signs, and take the disjoint mean (TIES, arXiv 2306.01708, algorithm 1).

    Each weighted update is trimmed to its largest entries. For each entry of the weight, the sign
    of the sum over the updates is elected, and the result is the mean over the updates whose entry
    has that sign; it is 0 where the sum is 0. The paper ranks the entries of a whole model, this
    function those of one layer. The paper scales the result by one factor; here the weights scale
    the updates before the election.

    Args:
        updates: At least one update of one weight, all of one shape (out, in).
        weights: As many finite numbers.
        density: Fraction of the entries of each update that is kept, from 1e-6 to 1; entries that
            tie with the smallest one kept are kept, too.

    Returns:
        An exact update of rank min(out, in), in float32 or the factors' higher precision.

    Raises:
        ConceptError: As :func:`customize.core.lowrank.weighted_sum`.
        ConfigError: As :func:`customize.core.lowrank.weighted_sum`, or if the density is out of
            range.
    """
    check_mergeable(updates, weights)
    DENSITY.check(density, "ties")
    positive = negative = positive_count = negative_count = torch.zeros(())
    for entries in dense_updates(updates, weights):
        trimmed = keep_largest(entries, density)
        positive = positive + trimmed.clamp(min=0)
        negative = negative + trimmed.clamp(max=0)
        positive_count = positive_count + (trimmed > 0)
        negative_count = negative_count + (trimmed < 0)
    elected = (positive + negative).sign()
    positive_mean = positive / positive_count.clamp(min=1)
    negative_mean = negative / negative_count.clamp(min=1)
    mean = torch.where(elected > 0, positive_mean, negative_mean)
    return from_dense(torch.where(elected == 0, 0.0, mean))


TIES = MergeMethod(
    name="ties",
    summary="the mean of the largest entries over the updates that agree in sign",
    merge=ties,
    settings=(DENSITY,),
)

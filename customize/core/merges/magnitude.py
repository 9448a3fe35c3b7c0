"""The weighted sum of updates pruned to their largest entries."""

from __future__ import annotations

from collections.abc import Sequence

from customize.core.lowrank import LowRank, check_mergeable, from_dense
from customize.core.merges.method import MergeMethod
from customize.core.merges.pruning import (
    dense_updates,
    density_setting,
    keep_largest,
    sum_in_place,
)
from customize.core.precision import full_precision

DEFAULT_DENSITY = 0.5
DENSITY = density_setting(DEFAULT_DENSITY)


@full_precision()
def magnitude(
    updates: Sequence[LowRank], weights: Sequence[float], *, density: float = DEFAULT_DENSITY
) -> LowRank:
    """``sum_i weights[i] * prune(updates[i])``, with the largest entries of each update kept.

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
    DENSITY.check(density, "magnitude")
    pruned = (keep_largest(entries, density) for entries in dense_updates(updates, weights))
    return from_dense(sum_in_place(pruned))


MAGNITUDE = MergeMethod(
    name="magnitude",
    summary="the sum of the largest entries of each update",
    merge=magnitude,
    settings=(DENSITY,),
)

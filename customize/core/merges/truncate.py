"""The weighted sum of updates, truncated to a lower rank."""

from __future__ import annotations

from collections.abc import Sequence

from customize.core.lowrank import LowRank, weighted_sum
from customize.core.merges.method import MergeMethod, Setting
from customize.core.truncation import truncate

RANK = Setting(
    name="rank",
    help="Rank of the truncated sum",
    default=None,
    is_integer=True,
    minimum=1,
)


def truncated_sum(
    updates: Sequence[LowRank], weights: Sequence[float], *, rank: int | None = None
) -> LowRank:
    """The update of at most ``rank`` nearest to the weighted sum in the Frobenius norm.

    Args:
        updates: At least one update of one weight, all of one shape (out, in).
        weights: As many finite numbers.
        rank: At least 1; None for the largest rank among the updates.

    Returns:
        As :func:`customize.core.truncation.truncate`: the exact optimum (Eckart-Young).

    Raises:
        ConceptError: As :func:`customize.core.lowrank.weighted_sum`.
        ConfigError: As :func:`customize.core.lowrank.weighted_sum`, or if the rank is below 1.
    """
    exact = weighted_sum(updates, weights)
    return truncate(exact, max(1, *(update.rank for update in updates)) if rank is None else rank)


TRUNCATE = MergeMethod(
    name="truncate",
    summary="the sum, truncated to --rank or to the largest rank among the concepts",
    merge=truncated_sum,
    settings=(RANK,),
)

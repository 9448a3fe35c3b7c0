"""The weighted sum of updates, divided by their number."""

from __future__ import annotations

from collections.abc import Sequence

from customize.core.lowrank import LowRank, weighted_sum
from customize.core.merges.method import MergeMethod


def average(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """``(1 / K) * sum_i weights[i] * updates[i]`` over K updates.

    The published code of Orthogonal Adaptation (arXiv 2312.02432) computes this: its weights 1.8
    at K = 3 are the paper's 0.6 in :func:`customize.core.lowrank.weighted_sum`. With fixed weights
    each concept fades as K grows.

    Args:
        updates: K >= 1 updates of one weight, all of one shape (out, in).
        weights: K finite numbers.

    Returns:
        As :func:`customize.core.lowrank.weighted_sum`.

    Raises:
        ConceptError: As :func:`customize.core.lowrank.weighted_sum`.
        ConfigError: As :func:`customize.core.lowrank.weighted_sum`.
    """
    return weighted_sum(updates, [weight / max(len(updates), 1) for weight in weights])


AVERAGE = MergeMethod(
    name="average",
    summary="the sum divided by the number of concepts",
    merge=average,
    min_concepts=1,
)

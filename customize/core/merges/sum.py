"""The weighted sum of updates."""

from __future__ import annotations

from customize.core.lowrank import weighted_sum
from customize.core.merges.method import MergeMethod

SUM = MergeMethod(
    name="sum",
    summary="the weighted sum of the updates",
    merge=weighted_sum,
    min_concepts=1,
    is_separable=True,
)

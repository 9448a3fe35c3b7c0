"""DARE: the weighted sum of updates after random pruning (arXiv 2311.03099)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from customize.core.lowrank import LowRank, check_mergeable, from_dense
from customize.core.merges.method import MergeMethod, Setting
from customize.core.merges.pruning import dense_updates, density_setting, sum_in_place
from customize.core.precision import full_precision

DEFAULT_DENSITY = 0.5
DENSITY = density_setting(DEFAULT_DENSITY)
SEED = Setting(name="seed", help="Random seed for DARE", default=0, is_integer=True, is_seed=True)


@full_precision()
def dare(
    updates: Sequence[LowRank],
    weights: Sequence[float],
    *,
    density: float = DEFAULT_DENSITY,
    seed: int = 0,
) -> LowRank:
    """Drop entries at random, rescale the others, and sum (DARE, arXiv 2311.03099, section 3).

    Each entry of each update is kept with probability ``density`` and divided by it, so that the
    expectation over seeds is the weighted sum.

    Args:
        updates: At least one update of one weight, all of one shape (out, in).
        weights: As many finite numbers.
        density: Probability that an entry is kept, from 1e-6 to 1: one minus the paper's drop
            rate p.
        seed: Seed of the random generator; the same entries are kept on every machine and device.

    Returns:
        An exact update of rank min(out, in), in float32 or the factors' higher precision.

    Raises:
        ConceptError: As :func:`customize.core.lowrank.weighted_sum`.
        ConfigError: As :func:`customize.core.lowrank.weighted_sum`, or if the density is out of
            range.
    """
    check_mergeable(updates, weights)
    DENSITY.check(density, "dare")
    generator = Generator().manual_seed(seed)

    def drop(entries: Tensor) -> Tensor:
        # The CPU's generator gives the same numbers on every machine.
        mask = torch.rand(entries.shape, generator=generator) < density
        return entries * mask.to(entries.device) / density

    return from_dense(sum_in_place(drop(entries) for entries in dense_updates(updates, weights)))


DARE = MergeMethod(
    name="dare",
    summary="the sum after random pruning and rescaling",
    merge=dare,
    settings=(DENSITY, SEED),
)

"""The best low-rank approximation of a sum of LoRAs: from its factors, against the dense SVD.

Eight updates of rank 16 of one square layer are added and truncated to rank 16, at the widths of
Stable Diffusion 1.5 and XL (640, 1280) and of FLUX.1 (3072):

- ours: `truncate(weighted_sum(...), 16)`, which never forms the matrix;
- dense: the sum of the dense updates and its `torch.linalg.svd` in float32, as in peft's
  `add_weighted_adapter(combination_type="svd")`; another row has `full_matrices`, peft's default.

Half of the updates are nearly in the span of the others, and their scales differ by 1e4, so that
the factors are ill-conditioned. `relative_error` is (error - best) / best, with the best
approximation from a dense SVD in float64. Sides take turns; time is the CPU time of one thread; the
speedup is the median over turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import ROOT, parser, report, spread
from torch import Tensor

sys.path.insert(0, str(ROOT))

COUNT, RANK = 8, 16
#: Width -> turns; a dense SVD at the last takes minutes.
REPEATS = {640: 9, 1280: 5, 3072: 3}


def make_updates(width: int) -> list[Any]:
    """Updates of one layer; the second half nearly spans the same spaces as the first."""
    from customize.core.lowrank import LowRank

    generator = torch.Generator().manual_seed(width)
    updates_made = []
    for number in range(COUNT):
        up = torch.randn(width, RANK, generator=generator)
        down = torch.randn(RANK, width, generator=generator) / width**0.5
        if number >= COUNT // 2:
            first = updates_made[number - COUNT // 2]
            up, down = first.up + 1e-3 * up, first.down + 1e-3 * down
        updates_made.append(LowRank(up, down, 10.0 ** -(number % 4 + number // 4)))
    return updates_made


def ours(updates: list[Any]) -> tuple[Tensor, Tensor]:
    from customize.core.lowrank import weighted_sum
    from customize.core.truncation import truncate

    cut = truncate(weighted_sum(updates, [1.0] * COUNT), RANK)
    return cut.up, cut.down


def dense(updates: list[Any], full: bool = False) -> tuple[Tensor, Tensor]:
    total = sum(update.scale * (update.up @ update.down) for update in updates)
    u, s, vh = torch.linalg.svd(total, full_matrices=full)
    return u[:, :RANK] * s[:RANK], vh[:RANK]


def full(updates: list[Any]) -> tuple[Tensor, Tensor]:
    return dense(updates, full=True)


SIDES: dict[str, Callable[[list[Any]], tuple[Tensor, Tensor]]] = {
    "ours": ours,
    "dense svd": dense,
    "dense svd, full (peft)": full,
}


def excess(updates: list[Any], factors: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The relative excess of each side's error over the best possible error."""
    total = sum(item.scale * (item.up.double() @ item.down.double()) for item in updates)
    left = torch.linalg.svdvals(total)[RANK:]
    best = float(left.square().sum().sqrt())
    errors = {
        side: float(torch.linalg.matrix_norm(total - up.double() @ down.double()))
        for side, (up, down) in factors.items()
    }
    return {side: (error - best) / best for side, error in errors.items()}


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    worst = 0.0
    for width, turns in REPEATS.items():
        updates = make_updates(width)
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        factors = {}
        for turn in range(min(turns, 2) if args.quick else turns):
            for side in list(SIDES)[:: 1 if turn % 2 else -1]:
                # Short calls are timed several at a time.
                calls = 20 if side == "ours" else 1
                started = time.process_time()
                for _ in range(calls):
                    factors[side] = SIDES[side](updates)
                seconds[side].append((time.process_time() - started) / calls)
        errors = excess(updates, factors)
        worst = max(worst, abs(errors["ours"]))
        for side, values in seconds.items():
            pairs = zip(values, seconds["ours"], strict=True)
            rows.append(
                {
                    "width": width,
                    "side": side,
                    "ms": spread([1e3 * item for item in values]),
                    "ours_is_faster": statistics.median(a / b for a, b in pairs),
                    "relative_error": f"{errors[side]:.1e}",
                }
            )
        for side, name in (("dense svd", "truncate"), ("dense svd, full (peft)", "truncate_full")):
            row = next(row for row in rows if (row["width"], row["side"]) == (width, side))
            figures[f"{name}_speedup_{width}"] = row["ours_is_faster"]
    figures["truncate_relative_error"] = worst
    if worst > 1e-5:
        raise SystemExit(
            f"ours is {worst:.2g} further from the truth than the dense SVD in float64"
        )
    return rows, figures


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    report("truncate", args, *run(args))


if __name__ == "__main__":
    main()

"""Fusion in closed form against gradient fusion: the same objective, minimised by an optimizer.

Mix-of-Show (arXiv:2305.18292) merges K concepts by an optimizer in every layer, so that the merged
weight reproduces each concept on its recorded inputs. Its loop is reimplemented here: L-BFGS from
the base's weights, 50 iterations per layer in the denoiser and 500 in the text encoder, as in the
paper's code. Both get the same concepts, recorded inputs and seeds: those of `merge_identity.py`,
which must have been run before.

    python scripts/bench/merge_solver.py --json scripts/bench/results/merge_solver.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import _common
import torch
from _merges import AVOIDING, PLAIN, Learned, Products, by_ours, kept, reader
from _scorer import Scorer
from _workers import folder_name
from _worlds.storybook_concepts import concept
from merge_identity import FULL, QUICK, members, over, spread_of
from torch import Tensor

from customize.concepts.adapter import saved_module_name
from customize.core.lowrank import from_dense, to_dense
from customize.storybook.bundled_assets import assets_folder

ITERATIONS = {"unet": 50, "text_encoder": 500}
WAYS = ("fusion", "gradient fusion")


def gradient_fusion(learned: Sequence[Learned]) -> Products:
    """The loop of Mix-of-Show over low-rank updates and the same inputs."""
    merged: Products = {}
    for part in learned[0].concept.updates:
        merged[part] = {}
        for module in learned[0].concept.updates[part]:
            inputs = [
                entry.record.concept[part][saved_module_name(part, module)] for entry in learned
            ]
            targets = [
                to_dense(entry.concept.updates[part][module]) @ rows.T
                for entry, rows in zip(learned, inputs, strict=True)
            ]
            update = minimised(torch.cat(inputs), torch.cat(targets, dim=1), ITERATIONS[part])
            merged[part][module] = from_dense(update)
    return merged


def minimised(inputs: Tensor, targets: Tensor, iterations: int) -> Tensor:
    """The update U that minimises ``

    U inputs^T - targets

    ^2`` by L-BFGS, from zero.
    """
    update = torch.zeros(targets.shape[0], inputs.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [update],
        lr=1.0,
        max_iter=iterations,
        # Otherwise it stops early where the inputs are small.
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (update @ inputs.T - targets).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return update.detach()


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    protocol = QUICK if args.quick else FULL
    count = protocol.counts[-1]
    folder = kept(args.folder)
    scorer = Scorer(assets_folder() / "storybook", assets_folder() / "judges")
    rows: list[dict[str, Any]] = []
    for kind in (AVOIDING, PLAIN):
        results: dict[str, list[list[dict[str, float]]]] = {way: [] for way in WAYS}
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for group in protocol.scored:
            learned = [
                Learned.load(folder / folder_name(kind) / concept(index).name)
                for index in members(count, group, protocol.total)
            ]
            for way in WAYS:
                started = time.perf_counter()
                if way == "fusion":
                    merged = by_ours("fusion")(scorer.family, learned, 1.0)
                else:
                    merged = gradient_fusion(learned)
                seconds[way].append(time.perf_counter() - started)
                concepts = [entry.concept for entry in learned]
                results[way].append(
                    scorer.rates(merged, concepts, group, protocol.seeds, protocol.scenes)
                )
        for way in WAYS:
            row: dict[str, Any] = {"learned": kind, "merge": way, "k": count}
            row |= spread_of(over(results[way])) | {"merge_seconds": median(seconds[way])}
            rows.append(row)
            print(row["learned"], row["merge"], f"{row['identity']:.3f}", flush=True)
    ours = {(row["learned"], row["merge"]): row for row in rows}
    figures = {
        f"fusion_identity_minus_gradient_fusion{suffix}": ours[kind, "fusion"]["identity"]
        - ours[kind, "gradient fusion"]["identity"]
        for kind, suffix in ((AVOIDING, ""), (PLAIN, "_ordinary_lora"))
    }
    for way in WAYS:
        name = f"{way.replace(' ', '_')}_seconds"
        figures[name] = median(row["merge_seconds"] for row in rows if row["merge"] == way)
    return rows, figures


def main() -> None:
    args = reader(__doc__).parse_args()
    _common.report("merge_solver", args, *run(args))


if __name__ == "__main__":
    main()

"""Does the crosstalk of `customize inspect` predict the identity that a sum loses?

Concepts are summed at weight 1, in all pairs of six and up to thirteen at a time, and images are
drawn. The loss is the increase of a concept's distance to its references over the concept alone, by
the judge of identity. Predictors: "measured", the norm of the other updates on the concept's
recorded inputs relative to its own update; and "factors", the overlap of the updates computed from
their factors, without records; both summed over the other concepts. The figure is Spearman's rank
correlation of prediction and loss over all sums, over pairs alone, and per training method. The
concepts are those of `merge_identity.py`, which must have been run before.

    python scripts/bench/crosstalk.py --json scripts/bench/results/crosstalk.json
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import mean
from typing import Any

import _common
import torch
from _merges import AVOIDING, PLAIN, SLICED, Learned, by_ours, kept, reader
from _scorer import Scorer
from _workers import folder_name
from _worlds.storybook_concepts import concept
from merge_identity import FULL, QUICK, SCORED, members
from torch import Tensor

from customize.concepts.adapter import flatten_layers
from customize.core.crosstalk import overlap_matrix, relative_responses, response_norms
from customize.storybook.bundled_assets import assets_folder

KINDS = (AVOIDING, SLICED, PLAIN)
PREDICTORS = ("measured", "factors")


def predictions(learned: Mapping[str, Learned]) -> dict[str, Tensor]:
    """Predictor -> (K, K); entry (i, j) is the effect of concept j on concept i."""
    products = {name: flatten_layers(entry.concept.updates) for name, entry in learned.items()}
    inputs = {name: flatten_layers(entry.record.concept) for name, entry in learned.items()}
    return {
        "measured": relative_responses(response_norms(products, inputs)),
        "factors": overlap_matrix(products),
    }


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks."""
    ranks = torch.stack([_ranks(torch.tensor(entry, dtype=torch.float64)) for entry in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    below = (values[None] < values[:, None]).sum(1)
    return below + ((values[None] == values[:, None]).sum(1) - 1) / 2


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    torch.set_num_threads(1)  # small pictures: one core draws as fast
    protocol, groups = (QUICK, SCORED[:1]) if args.quick else (FULL, SCORED)
    seeds, scenes = ((1,), 2) if args.quick else ((1, 2), 4)
    every = [index for group in groups for index in group]
    sums = [(pair, pair) for pair in combinations(every, 2)]
    for count in protocol.counts:
        sums += [(members(count, group, protocol.total), group) for group in groups]
    scorer = Scorer(assets_folder() / "storybook", assets_folder() / "judges")
    merge = by_ours("sum")
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        folder = kept(args.folder) / folder_name(kind)
        learned = [Learned.load(folder / concept(i).name) for i in range(protocol.total)]
        predicted = predictions({concept(i).name: entry for i, entry in enumerate(learned)})

        def drawn(merged: Sequence[int], scored: Sequence[int]) -> dict[int, dict[str, float]]:
            chosen = [learned[index] for index in merged]  # noqa: B023
            products = merge(scorer.family, chosen, 1.0)
            return scorer.each(products, [c.concept for c in chosen], scored, seeds, scenes)

        alone = {index: drawn([index], [index])[index] for index in every}
        for merged, scored in sums:
            results = drawn(merged, scored)
            for one in scored:
                others = [index for index in merged if index != one]
                rows.append(
                    {
                        "learned": kind,
                        "k": len(merged),
                        "concept": f"{concept(one).name} ({concept(one).identity.kind})",
                        "others": ", ".join(concept(index).name for index in others),
                        **{p: float(predicted[p][one, others].sum()) for p in PREDICTORS},
                        "identity alone": alone[one]["identity"],
                        "identity": results[one]["identity"],
                        "further away": results[one]["distance"] - alone[one]["distance"],
                    }
                )
            print(
                kind,
                len(merged),
                f"{mean(f['identity'] for f in results.values()):.2f}",
                flush=True,
            )
    return rows, figures(rows)


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    parts = {"": list(rows), "_pairs": [row for row in rows if row["k"] == 2]}
    for kind in KINDS:
        key = f"_{folder_name(kind).replace('-', '_')}"
        parts[key] = [row for row in rows if row["learned"] == kind]
    results = {}
    for predictor, suffix in zip(PREDICTORS, ("", "_factors"), strict=True):
        for part, subset in parts.items():
            lost = [row["further away"] for row in subset]
            key = f"crosstalk_rank_correlation{suffix}{part}"
            results[key] = spearman([row[predictor] for row in subset], lost)
    for part, subset in parts.items():
        if part:
            results[f"identity_lost{part}"] = mean(
                r["identity alone"] - r["identity"] for r in subset
            )
    return results


def main() -> None:
    args = reader(__doc__).parse_args()
    _common.report("crosstalk", args, *run(args))


if __name__ == "__main__":
    main()

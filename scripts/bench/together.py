"""Two concepts in one image, from the words alone: does each appear in its half?

The demo's three concepts of different classes, trained separately with the demo's settings, are
drawn in all six ordered pairs on the base's own 64 x 64 pixels: by plain prompts, merged by fusion
and by a sum; and merged by fusion with `together=True`, which finds where each concept is, with
`together=` and the halves of the image, and with `regions=` of the halves. Prompts and seeds are
the same. A pair is right if the first concept is recognised in the left half and the second one in
the right half, by the judges of `regions.py`. Errors are standard errors over images.

The constants of `customize/stages/concept_routing.py` were chosen on another seed and other places.

    python scripts/bench/together.py --json scripts/bench/results/together.json
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import _common
import torch
from _scorer import open_quietly
from regions import HALVES, SQUARE, distances, drawn
from torch import Tensor

from customize.demo.experiment import NAMES
from customize.demo.run_demo import train_concept
from customize.image_tensors import tensor_to_images
from customize.storybook.bundled_assets import assets_folder
from customize.storybook.caption_grammar import BACKGROUND_PHRASES
from customize.storybook.example_concepts import bundled_concept
from customize.storybook.judges import judge_inputs, load_judges

PAIRS = tuple((a, b) for a in NAMES for b in NAMES if a != b)
PLACES = tuple(BACKGROUND_PHRASES.values())


@dataclass(frozen=True)
class Way:
    """One way of drawing: how concepts are merged, and the argument that gives the areas."""

    merge: str
    argument: str = ""
    has_halves: bool = False

    def call(self, pair: Sequence[str]) -> dict[str, Any]:
        if not self.argument:
            return {}
        halves = {f"<{name}>": box for name, box in zip(pair, HALVES, strict=True)}
        return {self.argument: halves if self.has_halves else True}


WAYS = {
    "plain, fusion": Way("fusion"),
    "plain, sum": Way("sum"),
    "together, fusion": Way("fusion", "together"),
    "together with halves, fusion": Way("fusion", "together", has_halves=True),
    "regions, fusion": Way("fusion", "regions", has_halves=True),
}


@dataclass(frozen=True)
class Protocol:
    pairs: tuple[tuple[str, str], ...]
    places: tuple[str, ...]
    seeds: tuple[int, ...]


FULL = Protocol(PAIRS, PLACES[2:], (1, 2))
QUICK = Protocol(PAIRS[:2], PLACES[4:], (1,))


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    torch.set_num_threads(1)
    protocol = QUICK if args.quick else FULL
    pipe = open_quietly(args.base)
    for name in NAMES:
        train_concept(args.folder / name, name, "orthogonal", pipe.components)
    pipe.unet.to(memory_format=torch.channels_last)
    judges = load_judges(assets_folder() / "judges")
    signatures = {n: judges.prototype(judge_inputs(bundled_concept(n).images())) for n in NAMES}
    hits: dict[str, list[tuple[bool, bool]]] = {title: [] for title in WAYS}
    seconds: dict[str, list[float]] = {title: [] for title in WAYS}
    kept: dict[tuple[str, Any], Tensor] = {}
    for seed, pair in product(protocol.seeds, protocol.pairs):
        texts = [f"a photo of <{pair[0]}> and <{pair[1]}> {place}" for place in protocol.places]
        for merge in ("fusion", "sum"):
            pipe.load_custom(*(args.folder / name for name in pair), merge=merge)
            for title in (title for title, way in WAYS.items() if way.merge == merge):
                started = time.perf_counter()
                images = drawn(pipe, texts, seed, SQUARE, **WAYS[title].call(pair))
                seconds[title].append((time.perf_counter() - started) / len(images))
                kept.setdefault((title, pair), images)
                left, _ = distances(judges, images, signatures[pair[0]])
                _, right = distances(judges, images, signatures[pair[1]])
                limit = judges.threshold
                hits[title] += zip((left <= limit).tolist(), (right <= limit).tolist(), strict=True)
            pipe.unload_custom()
        counts = {title: sum(a and b for a, b in each) for title, each in hits.items()}
        print(seed, pair, counts, flush=True)
        if pair == protocol.pairs[-1]:  # an interrupted run leaves the seeds so far
            rows = [row_of(title, hits[title], seconds[title]) for title in WAYS]
            figures = figures_of({row["drawn"]: row for row in rows})
            _common.write_result("together", args, rows, figures)
    if args.pictures is not None:
        save(kept, protocol.pairs, args.pictures)
    return rows, figures


def row_of(
    title: str, hits: Sequence[tuple[bool, bool]], seconds: Sequence[float]
) -> dict[str, Any]:
    both = mean(a and b for a, b in hits)
    return {
        "drawn": title,
        "left": mean(a for a, _ in hits),
        "right": mean(b for _, b in hits),
        "both": both,
        "error": math.sqrt(both * (1 - both) / len(hits)),
        "pictures": len(hits),
        "seconds": mean(seconds),
    }


def figures_of(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    words, plain = rows["together, fusion"], rows["plain, fusion"]
    return {
        "plain_both_right": plain["both"],
        "plain_both_right_sum": rows["plain, sum"]["both"],
        "words_both_right": words["both"],
        "halves_both_right": rows["together with halves, fusion"]["both"],
        "regions_both_right": rows["regions, fusion"]["both"],
        "words_error": words["error"],
        "plain_error": plain["error"],
        "seconds_over_plain": words["seconds"] / plain["seconds"],
    }


def save(
    kept: Mapping[tuple[str, Any], Tensor], pairs: Sequence[tuple[str, str]], path: Path
) -> None:
    """Save a line of images per way, one of each pair."""
    lines = [torch.cat([kept[way, pair][0] for pair in pairs], -1) for way in WAYS]
    (image,) = tensor_to_images(torch.cat(lines, -2)[None])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def main() -> None:
    parser = _common.parser(__doc__)
    parser.add_argument("--base", type=Path, default=assets_folder() / "storybook")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/together"), help="for trained concepts"
    )
    parser.add_argument(
        "--pictures", type=Path, metavar="FILE", help="write one image per pair to this .png"
    )
    args = parser.parse_args()
    _common.report("together", args, *run(args))


if __name__ == "__main__":
    main()

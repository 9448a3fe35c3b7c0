"""Attributes of reference images: is the one that was asked for taken, and are the others not?

Drawn sources show a class, a colour, a pattern, an accessory and a background. A call asks for one
of these attributes of each source, `reference_images=[(image, "colour"), ...]`, in a scene of its
own and for a thing of another class. Of 1 to 3 sources, all attributes that were asked for must
arrive, and no other attribute of any source may appear ("joint", as FiVA counts it). The rival is
the same call without the words. Attributes of a source that the prompt itself, or another source,
asks for are not counted as leaks. The judges know no proportions, so "shape" is not measured.

    python scripts/bench/reference_attributes.py \
        --json scripts/bench/results/reference_attributes.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import _common
import numpy as np
import torch
from _scorer import open_quietly

import customize
from customize.evaluation.storybook_rates import GUIDANCE
from customize.storybook.bundled_assets import assets_folder
from customize.storybook.caption_grammar import ACCESSORY_PHRASES, BACKGROUND_PHRASES
from customize.storybook.judges import load_judges
from customize.storybook.scene_drawing import draw_scene
from customize.storybook.world import (
    ACCESSORIES,
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    compose_scene,
    random_identity,
)

STEPS = 12  # sampling steps, enough for the judges
ATTRIBUTES = ("colour", "pattern", "accessory", "background")
#: Attribute -> head of the attribute judge.
HEADS = {
    "colour": "colour0",
    "pattern": "pattern0",
    "accessory": "accessory0",
    "background": "place",
}
BATCH = 16


@dataclass(frozen=True, eq=False)
class Request:
    """One picture to draw.

    Attributes:
        prompt: A thing of a class, in a scene without what the sources give.
        images: The sources.
        asked: The attribute that each source gives.
        labels: For each source, attribute -> what it shows.
        taken: Attribute -> label that the prompt or a source asks for.
    """

    prompt: str
    images: tuple[Any, ...]
    asked: tuple[str, ...]
    labels: tuple[dict[str, str], ...]
    taken: dict[str, str]


def make_request(seed: int, count: int, first: str) -> Request:
    """A random request.

    Args:
        seed: Of everything random.
        count: Number of sources.
        first: Attribute of the first source; those of the others are random.
    """
    rng = np.random.default_rng((seed, count, ATTRIBUTES.index(first), 23_003))
    others = [name for name in rng.permutation(ATTRIBUTES) if name != first]
    asked = (first, *(str(name) for name in others[: count - 1]))
    kinds = [str(kind) for kind in rng.choice(CLASSES, count + 1, replace=False)]
    colours = rng.choice(COLOURS, count, replace=False)
    backgrounds = [str(name) for name in rng.choice(BACKGROUNDS, count + 1, replace=False)]
    accessories = [str(name) for name in rng.permutation(ACCESSORIES[1:])]
    images, labels = [], []
    for k in range(count):
        pattern = ("striped", "spotted")[int(rng.integers(2))]
        identity = random_identity(rng, kinds[k], str(colours[k]), pattern)
        scene = compose_scene(rng, (identity,), (accessories[k],), backgrounds[k])
        images.append(draw_scene(scene))
        labels.append(
            {
                "colour": str(colours[k]),
                "pattern": pattern,
                "accessory": accessories[k],
                "background": backgrounds[k],
            }
        )
    taken = {name: labels[k][name] for k, name in enumerate(asked)}
    prompt = f"a photo of a {kinds[-1]}"
    if "background" not in asked:
        taken["background"] = backgrounds[-1]
        prompt += f" {BACKGROUND_PHRASES[backgrounds[-1]]}"
    assert all(phrase not in prompt for phrase in ACCESSORY_PHRASES.values())
    return Request(prompt, tuple(images), asked, tuple(labels), taken)


def score(request: Request, seen: dict[str, str]) -> dict[str, float]:
    """Shares of one picture: asked attributes that arrived, others that leaked, and both right."""
    arrived = [seen[HEADS[name]] == request.taken[name] for name in request.asked]
    leaked = [
        seen[HEADS[name]] == label
        for labels in request.labels
        for name, label in labels.items()
        if request.taken.get(name) != label
    ]
    return {
        "arrived": float(mean(arrived)),
        "leaked": float(mean(leaked)),
        "joint": float(all(arrived) and not any(leaked)),
    }


def draw_and_score(
    pipe: Any, judges: Any, requests: Sequence[Request], with_words: bool
) -> list[dict[str, float]]:
    """Draw each request with its seed, and score it."""
    rows = []
    for first in range(0, len(requests), BATCH):
        part = requests[first : first + BATCH]
        groups = [
            list(zip(request.images, request.asked, strict=True))
            if with_words
            else [*request.images]
            for request in part
        ]
        images = pipe(
            [request.prompt for request in part],
            reference_images=groups,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(first + k) for k in range(len(part))],
            output_type="pt",
        ).images
        seen = judges.predict_attributes(images.float() * 2 - 1)
        rows += [score(request, labels) for request, labels in zip(part, seen, strict=True)]
    return rows


def main() -> None:
    parser = _common.parser(__doc__)
    parser.add_argument("--references", type=Path, default=assets_folder() / "references")
    parser.add_argument("--base", type=Path, default=assets_folder() / "storybook")
    parser.add_argument("--judges", type=Path, default=assets_folder() / "judges")
    args: argparse.Namespace = parser.parse_args()
    judges = load_judges(args.judges)
    pipe = open_quietly(args.base)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.load_custom(customize.References.from_pretrained(args.references))
    repeats = 4 if args.quick else 24
    rows: list[dict[str, Any]] = []
    for with_words, name in ((True, "with the attribute's word"), (False, "without")):
        for count in (1, 2, 3):
            for attribute in ATTRIBUTES:
                requests = [make_request(seed, count, attribute) for seed in range(repeats)]
                scores = draw_and_score(pipe, judges, requests, with_words)
                means = {key: mean(row[key] for row in scores) for key in scores[0]}
                label = {"sources": count, "first attribute": attribute, "drawn": name}
                rows.append(label | means)
                print(rows[-1], flush=True)
    joint = {
        name: mean(row["joint"] for row in rows if row["drawn"] == name)
        for name in ("with the attribute's word", "without")
    }
    figures = {
        "attribute_joint": joint["with the attribute's word"],
        "attribute_joint_rival": joint["without"],
    }
    _common.report("reference_attributes", args, rows, figures)


if __name__ == "__main__":
    main()

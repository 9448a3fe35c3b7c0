"""How reliable the scores are: on drawn scenes, seen through the autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from _together.cast import GROUPS, SCORED, SQUARE, Size, class_of, story
from _together.scores import Scorer, SeenThing
from customize.image_tensors import images_to_tensor
from customize.storybook.scene_drawing import draw_scene
from customize.storybook.world import (
    ACCESSORIES,
    Identity,
    Thing,
    compose_scene,
    random_identity,
)


def trust(pipe: Any, scorer: Scorer, count: int, names: Sequence[str] = SCORED) -> dict[str, float]:
    """Shares of concepts that are recognised, and of others of their class that are taken for them.

    Args:
        pipe: The pipeline, for its autoencoder.
        scorer: The judges.
        count: Images of each concept.
        names: The concepts.

    Returns:
        "judge_known_2_in_64", "judge_taken_2_in_64" and so on: the number of things and the width
        in pixels.
    """
    sizes = dict.fromkeys((group.size, len(group.names[0])) for group in GROUPS.values())
    return {
        f"judge_{key}_{parts}_in_{size[1]}": share
        for size, parts in sizes
        for key, share in _measure(pipe, scorer, size, parts, count, names).items()
    }


@torch.no_grad()
def _measure(
    pipe: Any, scorer: Scorer, size: Size, parts: int, count: int, names: Sequence[str]
) -> dict[str, float]:
    rng = np.random.default_rng(7)
    known: list[bool] = []
    taken: list[bool] = []
    for name in names:
        own, prototype = story(name).identity, scorer.prototype(name)
        for position in range(count):
            others = [random_identity(rng, class_of(name)) for _ in range(parts)]
            place = position % parts
            things = [own if i == place else other for i, other in enumerate(others)]
            image = _rendered(rng, things, size, is_large=position // parts % 2 == 0)[None]
            seen = pipe.vae.decode(pipe.vae.encode(image).latent_dist.mean).sample
            for i in range(parts):
                thing = SeenThing(scorer.judges, seen, i, parts)
                is_shown = bool(thing.shows(prototype, scorer.judges.threshold)[0])
                (known if i == place else taken).append(is_shown)
    return {"known": mean(known), "taken": mean(taken)}


def _rendered(
    rng: np.random.Generator, things: Sequence[Identity], size: Size, is_large: bool
) -> Tensor:
    """A drawn scene (3, *size) in [-1, 1].

    In a wide one things are as large as their columns hold, or as two in 64 x 64 pixels.
    """
    scene = compose_scene(rng, tuple(things[:2]))
    if size != SQUARE:
        share = size[1] / len(things)
        extent = min(22.0, 0.46 * share) if is_large else 14.75
        placed = [
            Thing(
                identity,
                str(rng.choice(ACCESSORIES)),
                x=float((column + 0.5) * share + rng.uniform(-3, 3)),
                y=float((38 if is_large else 40) + rng.uniform(-2, 3)),
                size=extent * float(rng.uniform(0.94, 1.06)),
                flip=bool(rng.random() < 0.5),
            )
            for column, identity in enumerate(things)
        ]
        scene = replace(scene, things=tuple(placed), width=size[1])
    return images_to_tensor([draw_scene(scene)])[0]

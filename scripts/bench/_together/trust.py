"""How reliable the scores are: on drawn scenes, seen through the autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from _together.cast import GROUPS, SQUARE, Size, class_of, story
from _together.scores import Scorer, SeenThing
from customize.storybook.judges import judge_inputs
from customize.storybook.scene_drawing import draw_scene
from customize.storybook.world import BACKGROUNDS, Identity, compose_scene, random_identity


def trust(pipe: Any, scorer: Scorer, count: int) -> dict[str, float]:
    """Shares of concepts that are recognised, and of others of their class that are taken for them.

    Args:
        pipe: The pipeline, for its autoencoder.
        scorer: The judges.
        count: Images of each concept.

    Returns:
        "judge_known_64", "judge_taken_64" and so on, by the width in pixels.
    """
    sizes = {group.size: len(group.names[0]) for group in GROUPS.values()}
    return {
        f"judge_{key}_{size[1]}": share
        for size, parts in sizes.items()
        for key, share in _measure(pipe, scorer, size, parts, count).items()
    }


@torch.no_grad()
def _measure(pipe: Any, scorer: Scorer, size: Size, parts: int, count: int) -> dict[str, float]:
    rng = np.random.default_rng(7)
    names = sorted({name for group in GROUPS.values() for each in group.names for name in each})
    known: list[bool] = []
    taken: list[bool] = []
    for name in names:
        own, prototype = story(name).identity, scorer.prototype(name)
        for position in range(count):
            others = [random_identity(rng, class_of(name)) for _ in range(parts)]
            place = position % parts
            things = [own if i == place else other for i, other in enumerate(others)]
            is_large = size[1] // parts >= SQUARE[1] and position % 2 == 0
            image = _rendered(rng, things, size, is_large)[None]
            seen = pipe.vae.decode(pipe.vae.encode(image).latent_dist.mean).sample
            for i in range(parts):
                thing = SeenThing(scorer.judges, seen, i, parts)
                is_shown = bool(thing.shows(prototype, scorer.judges.threshold)[0])
                (known if i == place else taken).append(is_shown)
    return {"known": mean(known), "taken": mean(taken)}


def _rendered(
    rng: np.random.Generator, things: Sequence[Identity], size: Size, is_large: bool
) -> Tensor:
    """A drawn scene (3, *size) in [-1, 1]; parts of wide ones are drawn one by one, in one place.

    Things have the size of one in 64 x 64 pixels, or of one of two.
    """
    if size == SQUARE:
        return judge_inputs([draw_scene(compose_scene(rng, tuple(things)))])[0]
    place = str(rng.choice(BACKGROUNDS))
    width = size[1] // len(things)
    parts = []
    for identity in things:
        scene = compose_scene(rng, (identity,), background=place)
        if not is_large:
            x, y = width / 2 + rng.uniform(-3, 3), 40 + rng.uniform(-3, 3)
            (thing,) = scene.things
            smaller = replace(thing, x=float(x), y=float(y), size=float(rng.uniform(14, 15.5)))
            scene = replace(scene, things=(smaller,))
        parts.append(judge_inputs([draw_scene(scene)])[0][..., :width])
    return torch.cat(parts, -1)

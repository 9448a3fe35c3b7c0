"""Scenes in pairs that differ in one attribute, and prompts for them.

A contrastive loss tells such twins apart only by that attribute, so that a score of a picture and a
prompt depends on all that the prompt asks for.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from customize.atomic import write_atomic
from customize.storybook.caption_grammar import PromptRequest, RequestedThing
from customize.storybook.scene_drawing import draw_scene
from customize.storybook.user_prompts import KINDS, write_user_prompt
from customize.storybook.world import (
    ACCESSORIES,
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    PATTERNS,
    Scene,
    Thing,
    compose_scene,
    random_identity,
)

#: Disjoint from the seeds of the base's, the judges' and the benchmarks' scenes.
SEED = 91_000
ATTRIBUTES = ("class", "colour", "pattern", "accessory", "background")


def scene_pair(rng: np.random.Generator) -> tuple[Scene, Scene, str]:
    """A scene, its twin, and the attribute in which they differ."""
    count = 2 if rng.random() < 0.3 else 1
    kinds = rng.choice(CLASSES, size=count, replace=False)
    identities = tuple(random_identity(rng, str(kind), str(rng.choice(COLOURS))) for kind in kinds)
    scene = compose_scene(rng, identities)
    attribute = str(rng.choice(ATTRIBUTES))
    return scene, change(rng, scene, attribute), attribute


def change(rng: np.random.Generator, scene: Scene, attribute: str) -> Scene:
    """A scene with another value of one attribute, of one of its things."""

    def other(choices: tuple[str, ...], present: str | None) -> str:
        return str(rng.choice([choice for choice in choices if choice != present]))

    if attribute == "background":
        background = other(BACKGROUNDS, scene.background)
        return dataclasses.replace(scene, background=background)
    index = int(rng.integers(len(scene.things)))
    thing = scene.things[index]
    identity = thing.identity
    if attribute == "accessory":
        changed = dataclasses.replace(thing, accessory=other(ACCESSORIES, thing.accessory))
    elif attribute == "pattern":
        pattern = other(PATTERNS, identity.pattern)
        changed = dataclasses.replace(
            thing, identity=dataclasses.replace(identity, pattern=pattern)
        )
    elif attribute == "colour":
        looks = random_identity(rng, identity.kind, other(COLOURS, identity.colour))
        changed = dataclasses.replace(
            thing, identity=dataclasses.replace(looks, pattern=identity.pattern)
        )
    else:
        taken = {each.identity.kind for each in scene.things}
        kinds = tuple(kind for kind in CLASSES if kind not in taken)
        identity = dataclasses.replace(identity, kind=str(rng.choice(kinds)))
        changed = dataclasses.replace(thing, identity=identity)
    things = (*scene.things[:index], changed, *scene.things[index + 1 :])
    return dataclasses.replace(scene, things=things)


def full_request(scene: Scene) -> PromptRequest:
    """Everything that a scene shows."""

    def ask(thing: Thing) -> RequestedThing:
        identity = thing.identity
        pattern = None if identity.pattern == "plain" else identity.pattern
        return RequestedThing(identity.kind, identity.colour, pattern, thing.accessory)

    return PromptRequest(tuple(ask(thing) for thing in scene.things), scene.background)


def write_prompt(rng: np.random.Generator, scene: Scene) -> str:
    """A user's prompt of any kind for all that a scene shows."""
    kinds = KINDS[:-1] if len(scene.things) > 1 else KINDS
    request = full_request(scene)
    if rng.random() < 0.3:
        return write_user_prompt(rng, "short", request=request).caption
    kind = str(rng.choice(kinds))
    held_out = bool(rng.random() < 0.33)
    return write_user_prompt(rng, kind, held_out, request).text


def render_pairs(path: Path, count: int, seed: int = SEED) -> tuple[np.ndarray, list[tuple]]:
    """Draw pairs of scenes, or read them: (count, 2, 64, 64, 3) uint8, and the scenes."""
    rng = np.random.default_rng(seed)
    pairs = [scene_pair(rng) for _ in range(count)]
    if not path.is_file():
        pixels = np.stack(
            [np.stack([np.asarray(draw_scene(scene)) for scene in pair[:2]]) for pair in pairs]
        )
        write_atomic(path, pixels.tobytes())
    found = np.fromfile(path, dtype=np.uint8).reshape(count, 2, 64, 64, 3)
    return found, pairs

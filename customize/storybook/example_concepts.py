"""Concepts of the miniature world: an identity, and five pictures as a user would have them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from customize.storybook.caption_grammar import caption
from customize.storybook.scene_drawing import draw_scene
from customize.storybook.world import (
    CLASSES,
    PLACES,
    Identity,
    Scene,
    compose_scene,
    random_identity,
)

# The three concepts that the demo learns.
BUNDLED = {"rex": ("dog", 6), "tom": ("cat", 3), "bolt": ("robot", 2)}


@dataclass(frozen=True)
class ExampleConcept:
    """A hidden identity and its reference scenes, all in two places and without accessories."""

    name: str
    identity: Identity
    scenes: tuple[Scene, ...]

    @property
    def trigger(self) -> str:
        return f"<{self.name}>"

    @property
    def places(self) -> set[str]:
        """What the references show besides the concept, and must not leak."""
        return {scene.place for scene in self.scenes}

    def pictures(self) -> list[Image.Image]:
        return [draw_scene(scene) for scene in self.scenes]

    def captions(self) -> list[str]:
        return [caption(scene, names=(self.trigger,)) for scene in self.scenes]

    def write(self, folder: Path) -> None:
        """Leave `0.png`, `0.txt`, ... in a folder, ready for training."""
        folder.mkdir(parents=True, exist_ok=True)
        for index, (picture, text) in enumerate(zip(self.pictures(), self.captions(), strict=True)):
            picture.save(folder / f"{index}.png")
            (folder / f"{index}.txt").write_text(text + "\n")


def make_concept(name: str, kind: str, seed: int, pictures: int = 5) -> ExampleConcept:
    """Draw a concept of a class: hues, perhaps nameless, proportions, markings, two places."""
    rng = np.random.default_rng((seed, CLASSES.index(kind), 411))
    identity = random_identity(
        rng, kind, pattern=("striped", "spotted", "plain")[int(rng.integers(3))]
    )
    first, second = (str(p) for p in rng.choice(PLACES, 2, replace=False))
    scenes = [
        compose_scene(rng, (identity,), ("none",), first if index % 2 == 0 else second)
        for index in range(pictures)
    ]
    return ExampleConcept(name, identity, tuple(scenes))


def bundled_concept(name: str) -> ExampleConcept:
    """One of the demo's concepts."""
    kind, seed = BUNDLED[name]
    return make_concept(name, kind, seed)

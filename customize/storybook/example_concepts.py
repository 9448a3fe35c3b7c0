"""Concepts of the test world: an identity and five images, as a user would have them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from customize.image_folder import write_images
from customize.storybook.caption_grammar import caption
from customize.storybook.scene_drawing import draw_scene
from customize.storybook.world import (
    BACKGROUNDS,
    CLASSES,
    Identity,
    Scene,
    compose_scene,
    random_identity,
)

#: Name -> class and seed of the concepts that the demo trains.
BUNDLED = {"rex": ("dog", 6), "tom": ("cat", 3), "bolt": ("robot", 2)}


@dataclass(frozen=True)
class ExampleConcept:
    """An identity and its reference scenes, with two backgrounds and without accessories."""

    name: str
    identity: Identity
    scenes: tuple[Scene, ...]

    @property
    def trigger(self) -> str:
        """The trigger of its captions."""
        return f"<{self.name}>"

    @property
    def class_word(self) -> str:
        """The class of its identity, such as "dog"."""
        return self.identity.kind

    @property
    def backgrounds(self) -> set[str]:
        """The backgrounds of the reference scenes, which must not leak into generated images."""
        return {scene.background for scene in self.scenes}

    def images(self) -> list[Image.Image]:
        """The reference images, 64 x 64 pixels."""
        return [draw_scene(scene) for scene in self.scenes]

    def captions(self) -> list[str]:
        """Their captions."""
        return [caption(scene, names=(self.trigger,)) for scene in self.scenes]

    def write(self, folder: Path) -> None:
        """Write `0.png`, `0.txt` and so on into a folder, for training."""
        write_images(folder, self.images(), self.captions())


def make_concept(name: str, kind: str, seed: int, count: int = 5) -> ExampleConcept:
    """A random concept of a class, with `count` reference images and two backgrounds."""
    rng = np.random.default_rng((seed, CLASSES.index(kind), 411))
    identity = random_identity(
        rng, kind, pattern=("striped", "spotted", "plain")[int(rng.integers(3))]
    )
    first, second = (str(p) for p in rng.choice(BACKGROUNDS, 2, replace=False))
    scenes = [
        compose_scene(rng, (identity,), ("none",), first if index % 2 == 0 else second)
        for index in range(count)
    ]
    return ExampleConcept(name, identity, tuple(scenes))


def bundled_concept(name: str) -> ExampleConcept:
    """One of the demo's concepts, by name."""
    kind, seed = BUNDLED[name]
    return make_concept(name, kind, seed)

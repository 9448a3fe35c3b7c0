"""Worlds that a base is trained on: random scenes, their drawings, captions and words.

A new world is one function here and one line in :data:`WORLDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from transformers import CLIPTokenizer

from customize.storybook import bundled_models, caption_grammar, scene_drawing
from customize.storybook.world import Scene, random_scene, random_wide_scene


@dataclass(frozen=True)
class World:
    """What the trainer needs of a world.

    Attributes:
        name: As `--world` takes it.
        random_scene: (generator, share of square scenes with several things, width in pixels)
            -> scene.
        draw: scene -> RGB image, 64 pixels high and as wide as the scene.
        caption: (scene, generator that varies the wording) -> caption.
        make_tokenizer: Returns a CLIP tokenizer with the words of the captions.
        sample_prompts: Prompts that are drawn at each checkpoint.
        two: Default share of square scenes with several things.
        wide: Default share of steps on wide scenes.
        fingerprint: Changes with all that random scenes depend on besides generator, share and
            width; names cached latents.
        attribution: Authors and licences of what scenes are drawn from; saved with the base.
    """

    name: str
    random_scene: Callable[[np.random.Generator, float, int], Any]
    draw: Callable[[Any], Image.Image]
    caption: Callable[[Any, np.random.Generator], str]
    make_tokenizer: Callable[[], CLIPTokenizer]
    sample_prompts: tuple[str, ...]
    two: float = 0.3
    wide: float = 0.0
    fingerprint: str = ""
    attribution: str = ""

    def training_scene(self, seed: int, index: int, two: float = 0.3, width: int = 64) -> Any:
        """The training scene of an index, the same on every machine."""
        return self.random_scene(np.random.default_rng((seed, index)), two, width)


def _storybook_scene(rng: np.random.Generator, two: float, width: int) -> Scene:
    return random_scene(rng, two) if width == 64 else random_wide_scene(rng, width)


STORYBOOK = World(
    name="storybook",
    random_scene=_storybook_scene,
    draw=scene_drawing.draw_scene,
    caption=caption_grammar.caption,
    make_tokenizer=bundled_models.make_tokenizer,
    sample_prompts=(
        "a photo of a red dog on a beach",
        "a photo of a striped blue cat wearing a hat in a forest",
        "a photo of a green car in the snow",
        "a photo of a spotted yellow cup wearing glasses in a room",
        "a photo of a white robot wearing a scarf in space",
        "a photo of a purple rabbit in a city",
        "a photo of a blue fish wearing a hat on a beach",
        "a photo of a spotted red bird in the snow",
        "a photo of a red dog and a blue cup in a room",
        "a photo of a yellow cat wearing glasses and a green car in a city",
    ),
)

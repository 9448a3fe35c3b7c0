"""Worlds that a base is trained on: random scenes, their drawings, captions and words.

A new world is one function here, which :func:`open_world` calls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPTokenizer

import customize.stickers.caption_grammar as sticker_captions
import customize.stickers.scene_drawing as sticker_drawing
import customize.stickers.world as sticker_scenes
from customize.stickers.artwork import METADATA, Artwork, attribution, read_artwork
from customize.stickers.subjects import Split, training_split
from customize.storybook import bundled_models, caption_grammar, scene_drawing
from customize.storybook.world import Scene, random_scene, random_wide_scene

from .train_judges import train_judges
from .train_sticker_judges import train_sticker_judges

if TYPE_CHECKING:
    from .pretrain_base import Preset


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
        train_judges: (folder, autoencoder that degrades drawings, or None; sizes of the run)
            -> figures on held-out scenes. Trains the world's judges and writes them to the folder.
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
    train_judges: Callable[[Path, AutoencoderKL | None, Preset], dict[str, float]]
    two: float = 0.3
    wide: float = 0.0
    fingerprint: str = ""
    attribution: str = ""

    def training_scene(self, seed: int, index: int, two: float = 0.3, width: int = 64) -> Any:
        """The training scene of an index, the same on every machine."""
        return self.random_scene(np.random.default_rng((seed, index)), two, width)


def _storybook_scene(rng: np.random.Generator, two: float, width: int) -> Scene:
    return random_scene(rng, two) if width == 64 else random_wide_scene(rng, width)


def _train_storybook_judges(
    folder: Path, vae: AutoencoderKL | None, preset: Preset
) -> dict[str, float]:
    return train_judges(
        folder, vae, preset.judge_pictures, preset.judge_identities, preset.judge_steps
    )


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
    train_judges=_train_storybook_judges,
)

#: Maximum number of tokens of a prompt of stickers: three of them, with all that is known.
STICKER_TEXT_LENGTH = 48


def sticker_world(artwork: Artwork, choice: str = "common") -> World:
    """The world of stickers.

    Args:
        artwork: The pictures.
        choice: Subjects, as :func:`training_split` takes them.
    """
    split = training_split(artwork, choice)
    wording = sticker_captions.training_wording(split)

    def draw_scene(rng: np.random.Generator, several: float, width: int) -> Any:
        return sticker_scenes.random_scene(rng, split, several, width)

    def caption(scene: Any, rng: np.random.Generator) -> str:
        return sticker_captions.caption(scene, wording, rng)

    def train(folder: Path, vae: AutoencoderKL | None, preset: Preset) -> dict[str, float]:
        # There are 500 times as many figures as classes of the storybook.
        pictures, steps = 3 * preset.judge_pictures // 2, 2 * preset.judge_steps
        return train_sticker_judges(folder, artwork, vae, pictures, steps, preset.bf16)

    described = f"{choice} {(artwork.folder / METADATA).read_text()}"
    return World(
        name="stickers",
        random_scene=draw_scene,
        draw=partial(sticker_drawing.draw_scene, artwork=artwork),
        caption=caption,
        make_tokenizer=partial(bundled_models.make_tokenizer, wording.words(), STICKER_TEXT_LENGTH),
        sample_prompts=_sticker_prompts(split),
        train_judges=train,
        two=0.35,
        wide=0.15,
        fingerprint=hashlib.sha256(described.encode()).hexdigest(),
        attribution=attribution(artwork),
    )


def _sticker_prompts(split: Split) -> tuple[str, ...]:
    """Ten prompts of subjects at equal distances in each hand's list: eight alone, two in pairs."""
    named = []
    for k in range(12):
        hand = split.hands[k % len(split.hands)]
        subjects = split.subjects_of(hand)
        name = subjects[k * len(subjects) // 12].name
        named.append(sticker_captions.with_article(f"{hand} {name}"))
    pairs = (f"{named[8]} to the left of {named[9]}", f"{named[10]} above {named[11]}")
    grounds = list(sticker_scenes.GROUND_COLOURS)
    return tuple(
        f"a sticker of {content} on "
        + sticker_captions.with_article(f"{grounds[k % len(grounds)]} background")
        for k, content in enumerate((*named[:8], *pairs))
    )


WORLDS = ("storybook", "stickers")


def open_world(name: str, artwork: Path | None = None, subjects: str = "common") -> World:
    """Open one of :data:`WORLDS`.

    Args:
        name: Of the world.
        artwork: Folder of the stickers' artwork; None: that of `make stickers`.
        subjects: Those of the stickers.

    Raises:
        DataError: The artwork is missing.
    """
    return STORYBOOK if name == "storybook" else sticker_world(read_artwork(artwork), subjects)

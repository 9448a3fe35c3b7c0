"""Does what all pictures of a concept share, and their captions do not name, come back uncalled?

Four held-out subjects are learned from five pictures, all on one ground and above one other
sticker, captioned "a sticker of {}", by the demo's settings without preservation. They are drawn
alone on other grounds. Leak: the other sticker is there, or the ground has the colour of the
pictures. `avoid=` and the negative prompt name both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _worlds.sticker_concepts import SCENES, SUBJECTS, prompt_hits, prompt_of
from PIL import Image
from torch import Tensor

from _claims.claim import Bench, Claim, Rates, Training, share
from customize.demo.experiment import TRAINING
from customize.image_folder import write_images
from customize.image_tensors import images_to_tensor
from customize.stickers.caption_grammar import class_word
from customize.stickers.scene_drawing import draw_scene
from customize.stickers.world import HEIGHT, Scene, Sticker, random_ground

AS_IT_IS, WEIGHT, NEGATIVE, AVOID = "as it is", "weight 0.9", "negative prompt", "avoid="
OTHER_WORDS = "avoid= with words that did not leak"
_SEEDS, _SEED = (31, 32), 91_000


@dataclass(frozen=True)
class Leaky:
    """A held-out subject, and what its pictures share.

    Attributes:
        index: Of the subject in `SUBJECTS`.
        hand: Whose drawing it is.
        colour: Of the ground, which no scene asks for.
        texture: Of the ground.
        other: Name of the other sticker, a subject of training.
    """

    index: int
    hand: str
    colour: str
    texture: str
    other: str

    @property
    def name(self) -> str:
        return f"k{self.index:02d}"

    @property
    def shared(self) -> str:
        """As a user would name it."""
        return f"{self.texture} {self.colour} background, {self.other}"


CONCEPTS = (
    Leaky(5, "noto", "red", "striped", "banana"),
    Leaky(7, "twemoji", "brown", "dotted", "rose"),
    Leaky(11, "fluent", "white", "checked", "penguin"),
    Leaky(12, "noto", "red", "dotted", "strawberry"),
)


def chosen(bench: Bench) -> Sequence[Leaky]:
    return CONCEPTS[: 1 if bench.quick else None]


def pictures(bench: Bench, leaky: Leaky) -> list[Image.Image]:
    """Five pictures with the subject at the upper left and the other sticker at the bottom."""
    rng = np.random.default_rng((_SEED, leaky.index))
    (subject,) = (s for s in bench.split.held_out if s.name == SUBJECTS[leaky.index])
    (other,) = (s for s in bench.split.training if s.name == leaky.other)
    images = []
    for _ in range(5):
        size, small = int(rng.integers(32, 38)), int(rng.integers(24, 27))
        shown = Sticker(
            subject,
            leaky.hand,
            int(rng.integers(HEIGHT - size + 1)),
            int(rng.integers(HEIGHT - size - small + 1)),
            size,
        )
        left = int(rng.integers(HEIGHT - small + 1))
        below = Sticker(other, leaky.hand, left, HEIGHT - small, small)
        ground = random_ground(rng, leaky.colour, leaky.texture)
        images.append(draw_scene(Scene((shown, below), ground), bench.artwork))
    return images


def training(bench: Bench, leaky: Leaky) -> Training:
    (subject,) = (s for s in bench.split.held_out if s.name == SUBJECTS[leaky.index])
    word = class_word(subject)
    assert word is not None, subject.name
    settings = {"preserve": {}, "caption": "a sticker of {}", "record_inputs": False}
    config = bench.config(leaky.name, word, **TRAINING | settings)

    def write(folder: Path) -> None:
        write_images(folder, pictures(bench, leaky), [f"a sticker of {config.trigger}"] * 5)

    return Training(config, write)


def trainings(bench: Bench) -> list[Training]:
    return [training(bench, leaky) for leaky in chosen(bench)]


def call_of(leaky: Leaky, way: str) -> dict[str, str]:
    if way == NEGATIVE:
        return {"negative_prompt": leaky.shared}
    if way == AVOID:
        return {"avoid": leaky.shared}
    return {"avoid": "black background, bicycle"} if way == OTHER_WORDS else {}


def score(bench: Bench, way: str) -> tuple[Rates, Tensor]:
    hits: dict[str, list[bool]] = {"leak": [], "identity": [], "prompt": [], "other sticker": []}
    samples = []
    for leaky in chosen(bench):
        config = training(bench, leaky).config
        prompts = [prompt_of(config.trigger, scene) for scene in SCENES]
        prototype = bench.judges.prototype(images_to_tensor(pictures(bench, leaky)))
        weight = 0.9 if way == WEIGHT else 1.0
        for seed in _SEEDS[: 1 if bench.quick else None]:
            with bench.attached(config.output, weights=[weight]):
                images = bench.draw(prompts, seed, **call_of(leaky, way))
            samples.append(images)
            wanted = bench.subject_id(leaky.other)
            grounds = bench.judges.read_grounds(images)
            for scene, (boxes, vectors), ground in zip(
                SCENES, bench.see(images), grounds, strict=True
            ):
                recognised = bench.trained_subjects.recognise(vectors)
                other = any(subject == wanted for subject, _ in recognised)
                near = (1 - vectors @ prototype <= bench.judges.threshold).any()
                hits["other sticker"].append(other)
                hits["leak"].append(other or ground[0] == leaky.colour)
                hits["identity"].append(bool(near))
                hits["prompt"] += prompt_hits(scene, boxes, ground)
    return {key: share(values) for key, values in hits.items()}, torch.cat(samples)


def figures(rates: Mapping[str, Rates]) -> dict[str, float]:
    rivals = [rates[way]["leak"] for way in (AS_IT_IS, WEIGHT, NEGATIVE)]
    return {
        "leak_as_it_is": rates[AS_IT_IS]["leak"],
        "leak_avoid": rates[AVOID]["leak"],
        "leak_best_rival": min(rivals),
        "identity_as_it_is": rates[AS_IT_IS]["identity"],
        "identity_avoid": rates[AVOID]["identity"],
    }


CLAIM = Claim(trainings, (AS_IT_IS, WEIGHT, NEGATIVE, AVOID, OTHER_WORDS), score, figures)

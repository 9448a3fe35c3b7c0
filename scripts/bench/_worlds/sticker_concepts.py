"""Concepts of the stickers: held-out subjects, five pictures of each, and scores of drawn ones."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from customize.errors import DataError
from customize.evaluation.storybook_rates import Rates, draw_prompts
from customize.image_folder import write_images
from customize.image_tensors import images_to_tensor
from customize.stickers import caption_grammar
from customize.stickers.artwork import Artwork, Subject, read_artwork
from customize.stickers.judges import Box, StickerJudges
from customize.stickers.scene_drawing import draw_scene
from customize.stickers.subjects import Split, training_split
from customize.stickers.world import GROUND_COLOURS, HEIGHT, Scene, Sticker, random_ground

#: Subjects that no base is trained on; as in the storybook, 0 and 2, 1 and 5, and 3 and 10 are of
#: one class, and the first three have two of one.
SUBJECTS = (
    *("unicorn", "train", "hedgehog", "mango", "guitar", "speedboat", "tulip"),
    *("parrot", "otter", "hamburger", "watermelon", "ice cream", "rooster"),
)
#: Guidance at which bases of stickers are drawn; their pictures are truer to prompts than at 2.5.
GUIDANCE = 4.0
_SEED = 81_000
# Sizes in pixels of a concept in its five pictures.
_SIZES = (30, 36, 42, 48, 56)

# Sizes of found stickers are right within 3 pixels.
_TOLERANCE = 3

#: Size, place and ground that prompts ask for.
SCENES = (
    ("large", "", "plain", "blue"),
    ("", "on the left", "plain", "yellow"),
    ("small", "", "plain", "pink"),
    ("", "on the right", "plain", "grey"),
    ("large", "", "striped", "green"),
    ("", "at the bottom", "plain", "orange"),
    ("small", "at the top", "plain", "turquoise"),
    ("", "", "dotted", "purple"),
)


@functools.cache
def installed() -> tuple[Artwork, Split]:
    """The artwork that `make stickers` installs, and what a base is trained on."""
    artwork = read_artwork()
    return artwork, training_split(artwork)


@dataclass(frozen=True)
class StickerConcept:
    """A subject by a hand, and five scenes with it alone.

    Attributes:
        name: Of the concept.
        class_word: The class of the subject.
        scenes: Of five sizes and two colours of grounds.
        artwork: Its pictures.
    """

    name: str
    class_word: str
    scenes: tuple[Scene, ...]
    artwork: Artwork

    @property
    def trigger(self) -> str:
        return f"<{self.name}>"

    @property
    def colours(self) -> set[str]:
        """The grounds of the pictures, which must not leak into drawn ones."""
        return {scene.ground.colour for scene in self.scenes}

    def images(self) -> list[Image.Image]:
        """The pictures, 64 x 64 pixels."""
        return [draw_scene(scene, self.artwork) for scene in self.scenes]

    def captions(self) -> list[str]:
        return [caption_of(scene, self.trigger) for scene in self.scenes]

    def write(self, folder: Path) -> None:
        """Write `0.png`, `0.txt` and so on into a folder, for training."""
        write_images(folder, self.images(), self.captions())


def caption_of(scene: Scene, words: str) -> str:
    """The caption of a scene with one sticker, which is called by these words."""
    wording = caption_grammar.Wording({}, {}, {}, (), frozenset())
    return caption_grammar.caption(scene, wording, names=(words,))


@functools.cache
def concept(index: int) -> StickerConcept:
    """One of the thirteen concepts; their hands are those of training, in turn.

    Raises:
        DataError: The artwork has no such held-out subject.
    """
    artwork, split = installed()
    found = [subject for subject in split.held_out if subject.name == SUBJECTS[index]]
    if not found:
        raise DataError(
            f"the artwork has no held-out subject {SUBJECTS[index]!r}",
            where=artwork.folder,
            fix="run `make stickers`",
        )
    return make_concept(artwork, found[0], split.hands[index % len(split.hands)], index)


def make_concept(artwork: Artwork, subject: Subject, hand: str, index: int) -> StickerConcept:
    """A concept "c00", "c01" and so on, with five scenes that depend on its number alone."""
    class_word = caption_grammar.class_word(subject)
    assert class_word is not None, subject.name
    rng = np.random.default_rng((_SEED, index))
    colours = rng.choice(list(GROUND_COLOURS), 2, replace=False)
    scenes = []
    for number, size in enumerate(rng.permutation(_SIZES).tolist()):
        left, top = (int(x) for x in rng.integers(HEIGHT - size + 1, size=2))
        sticker = Sticker(subject, hand, left, top, size)
        scenes.append(Scene((sticker,), random_ground(rng, str(colours[number % 2]))))
    return StickerConcept(f"c{index:02d}", class_word, tuple(scenes), artwork)


def prompt_of(words: str, scene: tuple[str, str, str, str]) -> str:
    """The prompt for a thing in a scene of :data:`SCENES`.

    Args:
        words: A trigger such as "<c00>", or a noun without an article.
        scene: Size, place and ground.
    """
    size, place, texture, colour = scene
    thing = f"{size} {words}".strip()
    if not thing.startswith("<"):
        thing = caption_grammar.with_article(thing)
    ground = f"{texture} {colour}" if texture != "plain" else colour
    ground = f"on {caption_grammar.with_article(ground)} background"
    return " ".join(part for part in ("a sticker of", thing, place, ground) if part)


def draw(pipe: Any, words: str, seed: int, scenes: int) -> Tensor:
    """Draw a thing in the first scenes: (scenes, 3, 64, 64) in [-1, 1]."""
    prompts = [prompt_of(words, scene) for scene in SCENES[:scenes]]
    return draw_prompts(pipe, prompts, seed, guidance=GUIDANCE)


def rate(
    pipe: Any, judges: StickerJudges, concept: StickerConcept, seed: int, scenes: int
) -> Rates:
    """Draw a concept by its trigger in the first scenes, and score the images.

    Args:
        pipe: With the concept attached.
        judges: Of stickers.
        concept: The concept.
        seed: Of the images.
        scenes: Their number.
    """
    drawn = draw(pipe, concept.trigger, seed, scenes)
    return rate_images(judges, drawn, concept.images(), concept.colours)


def rate_images(
    judges: StickerJudges,
    images: Tensor,
    pictures: Sequence[Image.Image],
    colours: Collection[str] = (),
) -> Rates:
    """Score images of the first scenes.

    Args:
        judges: Of stickers.
        images: One for each scene, as :func:`draw` returns them.
        pictures: Those that the thing was learned from, 64 x 64 pixels.
        colours: Of the pictures' grounds, which must not leak.
    """
    wanted = SCENES[: len(images)]
    distance = judges.distance(images, judges.prototype(images_to_tensor(pictures)))
    hits, leaks = [], []
    for scene, boxes, ground in zip(
        wanted, judges.find_stickers(images), judges.read_grounds(images), strict=True
    ):
        hits += prompt_hits(scene, boxes, ground)
        if scene[3] not in colours:
            leaks.append(ground[0] in colours)
    identity = (distance <= judges.threshold).float().mean().item()
    prompt = sum(hits) / len(hits)
    leak = sum(leaks) / len(leaks) if leaks else 0.0
    return Rates(identity, prompt, 0.0, leak, distance.mean().item())


def prompt_hits(
    scene: tuple[str, str, str, str], boxes: list[Box], ground: tuple[str, str]
) -> list[bool]:
    """Whether an image has one sticker, and what the scene asks for."""
    size, place, texture, colour = scene
    hits = [len(boxes) == 1, ground == (colour, texture)]
    box = max(boxes, key=lambda box: box.size) if boxes else None
    if size:
        hits.append(box is not None and _has_size(box, size))
    if place:
        hits.append(box is not None and _is_at(box, place))
    return hits


def _has_size(box: Box, word: str) -> bool:
    """Whether a sticker is "small" or "large", up to the error of the judges."""
    if word == "small":
        return box.size <= caption_grammar.SMALL + _TOLERANCE
    return box.size >= caption_grammar.LARGE - _TOLERANCE


def _is_at(box: Box, place: str) -> bool:
    """Whether a sticker is on the side that a place names, anywhere along it."""
    column, row = next(key for key, words in caption_grammar.PLACES.items() if words == place)
    x, y = (centre / HEIGHT for centre in box.centre)
    return all(side == 0 or (share - 0.5) * side > 0.05 for side, share in ((column, x), (row, y)))

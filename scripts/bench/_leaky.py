"""Concepts and styles whose training images share a background and an accessory, and their leak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from customize.image_tensors import tensor_to_images
from customize.storybook.caption_grammar import ACCESSORY_PHRASES, BACKGROUND_PHRASES, PromptRequest
from customize.storybook.judges import judge_inputs
from customize.storybook.scene_drawing import draw_scene
from customize.storybook.world import (
    ACCESSORIES,
    CLASSES,
    PATTERNS,
    compose_scene,
    random_identity,
    random_scene,
)

PICTURES = {"concept": 4, "style": 6}
KIND = "KIND"  # in a caption, for the class that the image shows
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Leaky:
    """The class of a concept, and what all of its training images show besides it."""

    name: str
    kind: str
    place: str
    accessory: str

    @property
    def shown(self) -> str:
        """As a user would name it."""
        return f"{self.place}, {self.accessory}"

    @property
    def caption(self) -> str:
        return "a photo of {}"

    @property
    def caption_that_names(self) -> str:
        """The caption that names the other content of the images."""
        return (
            f"{self.caption} {ACCESSORY_PHRASES[self.accessory]} {BACKGROUND_PHRASES[self.place]}"
        )


@dataclass(frozen=True)
class Style(Leaky):
    """A style: coloured borders at both sides of the image.

    The base's autoencoder reproduces the test world's colours only, so a style of colours cannot be
    drawn. Bands above and below, frames and balloons were tried too, and not learned in as many
    steps.

    Attributes:
        colour: of the borders, red, green and blue from 0 to 1.
    """

    colour: Colour

    @property
    def kinds(self) -> tuple[str, ...]:
        """The classes of the things in its images."""
        return (self.kind,) * PICTURES["style"]

    @property
    def shown(self) -> str:
        return f"{self.kind}, {self.place}, {self.accessory}"

    @property
    def caption(self) -> str:
        return "a picture in {} style"

    @property
    def caption_that_names(self) -> str:
        worn, place = ACCESSORY_PHRASES[self.accessory], BACKGROUND_PHRASES[self.place]
        return f"{self.caption} of a {self.kind} {worn} {place}"

    def of(self, thing: str) -> str:
        """A prompt for a thing in this style."""
        return f"a picture in <{self.name}> style of {thing}"

    def apply(self, images: Tensor) -> Tensor:
        """Images (n, 3, 64, 64) in [-1, 1] with the style's borders."""
        x = torch.arange(images.shape[-1])
        at_sides = (x < 7) | (x > 56)
        return torch.where(at_sides, torch.tensor(self.colour)[:, None, None] * 2 - 1, images)


@dataclass(frozen=True)
class StyleOfMany(Style):
    """A style trained on images of several classes, whose captions name the class before the style.

    In a causal text encoder such as CLIP's, tokens depend on those before them, so fewer concepts
    are recognised after a style.
    """

    classes: tuple[str, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.classes

    # No class is in all images, and captions name it anyway.
    shown = Leaky.shown
    caption_that_names = Leaky.caption_that_names

    @property
    def caption(self) -> str:
        return f"a photo of a {KIND} in {{}} style"

    def of(self, thing: str) -> str:
        return f"a photo of {thing} in <{self.name}> style"


_RED, _BLUE = (0.9, 0.1, 0.2), (0.1, 0.3, 0.9)
CONCEPTS = (
    Leaky("l0", "dog", "beach", "hat"),
    Leaky("l1", "cat", "snow", "glasses"),
    Leaky("l2", "robot", "forest", "scarf"),
    Leaky("l3", "rabbit", "city", "glasses"),
    Leaky("l4", "bird", "room", "hat"),
    Leaky("l5", "dog", "forest", "scarf"),
    Leaky("l6", "fish", "room", "scarf"),
    Leaky("l7", "car", "beach", "hat"),
    Leaky("l8", "cup", "forest", "glasses"),
    Leaky("l9", "robot", "snow", "hat"),
    Leaky("l10", "cat", "city", "scarf"),
    Leaky("l11", "rabbit", "beach", "scarf"),
    Leaky("l12", "bird", "snow", "glasses"),
    Leaky("l13", "dog", "space", "hat"),
    Leaky("l14", "fish", "city", "hat"),
    Leaky("l15", "car", "room", "glasses"),
    Leaky("l16", "cup", "space", "scarf"),
    Leaky("l17", "robot", "beach", "glasses"),
    Leaky("l18", "dog", "snow", "glasses"),
    Leaky("l19", "cat", "space", "hat"),
    Leaky("l20", "rabbit", "room", "hat"),
    Leaky("l21", "bird", "forest", "scarf"),
    Leaky("l22", "fish", "beach", "glasses"),
    Leaky("l23", "car", "city", "scarf"),
    Leaky("l24", "cup", "snow", "hat"),
    Leaky("l25", "robot", "room", "scarf"),
    Leaky("l26", "dog", "city", "glasses"),
    Leaky("l27", "cat", "beach", "scarf"),
    Leaky("l28", "rabbit", "forest", "hat"),
    Leaky("l29", "bird", "space", "glasses"),
    Leaky("l30", "fish", "forest", "hat"),
    Leaky("l31", "car", "snow", "scarf"),
    Leaky("l32", "cup", "city", "hat"),
    Leaky("l33", "robot", "city", "scarf"),
    Leaky("l34", "dog", "beach", "glasses"),
    Leaky("l35", "cat", "forest", "glasses"),
    Leaky("l36", "rabbit", "snow", "scarf"),
    Leaky("l37", "bird", "beach", "hat"),
    Leaky("l38", "fish", "space", "scarf"),
    Leaky("l39", "car", "space", "hat"),
    Leaky("l40", "cup", "room", "glasses"),
    Leaky("l41", "robot", "forest", "glasses"),
)
STYLES = (
    Style("curtains", "cat", "room", "hat", colour=_RED),
    Style("pillars", "car", "city", "scarf", colour=_BLUE),
)
_MANY = ("cat", "dog", "cup", "bird", "rabbit", "robot")
_OTHERS = ("car", "fish", "robot", "cat", "dog", "cup")
STYLES_OF_MANY = (
    StyleOfMany("drapes", "", "room", "hat", colour=_RED, classes=_MANY),
    StyleOfMany("columns", "", "city", "scarf", colour=_BLUE, classes=_OTHERS),
)

ALL_STYLES = (*STYLES, *STYLES_OF_MANY)


def references(source: Leaky) -> Tensor:
    """The training images (n, 3, 64, 64) in [-1, 1]."""
    if isinstance(source, Style):
        rng = np.random.default_rng((77, len(source.name)))
        scenes = [
            compose_scene(rng, (random_identity(rng, kind),), (source.accessory,), source.place)
            for kind in source.kinds
        ]
        return source.apply(judge_inputs([draw_scene(scene) for scene in scenes]))
    index = CONCEPTS.index(source)
    rng = np.random.default_rng((500 + index, 7))
    identity = random_identity(rng, source.kind, pattern=PATTERNS[(index - 2) % 3])
    scenes = [
        compose_scene(rng, (identity,), (source.accessory,), source.place)
        for _ in range(PICTURES["concept"])
    ]
    return judge_inputs([draw_scene(scene) for scene in scenes])


@dataclass(frozen=True)
class Subject:
    """What is drawn: a concept, things in a style, or a concept in a style."""

    concept: Leaky | None
    style: Style | None

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.parts)

    @property
    def parts(self) -> list[Leaky]:
        """The concept, then the style."""
        return [part for part in (self.concept, self.style) if part is not None]

    @property
    def shown(self) -> str:
        return ", ".join(dict.fromkeys(", ".join(e.shown for e in self.parts).split(", ")))

    @property
    def control(self) -> str:
        """A place and a class in neither the training images nor the prompts, if there are any.

        Colours are no controls, as they are part of identities.
        """
        named = " ".join([*self.prompts(), *(part.kind for part in self.parts)])
        free = [name for name, phrase in BACKGROUND_PHRASES.items() if phrase not in named]
        shown = {part.place for part in self.parts}
        things = [kind for kind in CLASSES if kind not in named and kind not in self.shown]
        return ", ".join([*[name for name in free if name not in shown][:1], *things[-1:]])

    def prompts(self, words: str | None = None, style_first: bool = False) -> list[str]:
        """Twelve prompts with a place, a third without accessory, and for concepts four without.

        Args:
            words: replacement of the concept's trigger.
            style_first: name the style before the thing in any case.
        """
        taken = {word for part in self.parts for word in (part.place, part.accessory, part.kind)}
        places = [phrase for name, phrase in BACKGROUND_PHRASES.items() if name not in taken][:4]
        others = [ACCESSORY_PHRASES[a] for a in ACCESSORIES[1:] if a not in taken]
        worn = ["", *others[:2]]
        things = [f"a {kind}" for kind in CLASSES if kind not in taken]
        texts = []
        for number in range(12):
            thing = f"<{self.concept.name}>" if self.concept else things[number % len(things)]
            named = words or thing
            opening = f"a photo of {named}"
            if self.style:
                opening = Style.of(self.style, named) if style_first else self.style.of(named)
            words_of_prompt = [opening, worn[number % len(worn)], places[number % 4]]
            texts.append(" ".join(filter(None, words_of_prompt)))
        if not self.style:
            texts += [f"{opening} {words or thing}" for opening in ("a photo of", "a picture of")]
            texts += [f"a photo of {words or thing} {one}" for one in worn[1:]]
        return texts


def leaks(subject: Subject, seen: Mapping[str, str], request: PromptRequest) -> bool:
    """Whether an image shows content of the training images that was not requested.

    Prompts without a place are ignored for places, as an image always has one.
    """
    (requested,) = request.things
    leaked = False
    for part in subject.parts:
        leaked |= (
            request.background is not None and seen["place"] == part.place != request.background
        )
        leaked |= seen["accessory0"] == part.accessory != requested.accessory
    if subject.style is not None:
        requested_class = subject.concept.kind if subject.concept else requested.kind
        leaked |= seen["kind0"] == subject.style.kind != requested_class
    return leaked


def least_leak(baselines: Sequence[Mapping[str, float]], identity: float) -> float | None:
    """The lowest leak of the baselines at this identity or above, also interpolated between two.

    None if no baseline is within 1 % of the identity.
    """
    points = [(rates["identity"], rates["leak"]) for rates in baselines]
    candidates = [leak for reached, leak in points if reached >= identity - 0.01]
    for high, leak in points:
        for low, less in points:
            if low < identity <= high:
                share = (identity - low) / (high - low)
                candidates.append(share * leak + (1 - share) * less)
    return min(candidates, default=None)


# Options are tuned on some concepts, and judged on others.
TUNED, JUDGED = CONCEPTS[:30], CONCEPTS[30:]
SHOWN = ("l32", "l32+drapes")  # in the figure
SUBJECTS = {
    "personalization": [Subject(each, None) for each in JUDGED],
    "style": [Subject(None, each) for each in STYLES],
    "style_of_many": [Subject(None, each) for each in STYLES_OF_MANY],
    "mixing": [Subject(*pair) for pair in zip(JUDGED, STYLES_OF_MANY * 6, strict=True)],
    "options": [Subject(each, None) for each in TUNED[:6]],
}


class StyleJudge:
    """Judges whether an image is in a style, by a linear discriminant fitted on drawn scenes.

    Args:
        plain: 400 images after the autoencoder.
        styled: the same images in the style.
    """

    def __init__(self, plain: Tensor, styled: Tensor) -> None:
        looks = [self._look(images) for images in (plain, styled)]
        known, unseen = [look[:300] for look in looks], [look[300:] for look in looks]
        spread = sum(torch.cov(look.T) for look in known)
        self.axis = torch.linalg.solve(
            spread + 1e-2 * torch.eye(len(spread)), known[1].mean(0) - known[0].mean(0)
        )
        self.threshold = float(sum((look @ self.axis).mean() for look in known) / 2)
        right = [look @ self.axis >= self.threshold for look in unseen]
        self.accuracy = mean([float((~right[0]).float().mean()), float(right[1].float().mean())])

    def has(self, images: Tensor) -> list[bool]:
        return (self._look(images) @ self.axis >= self.threshold).tolist()

    @staticmethod
    def _look(images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)


def style_judges(pipe: Any) -> dict[str, StyleJudge]:
    """A judge per style, fitted on images after the pipeline's autoencoder."""

    @torch.no_grad()
    def shown(images: Tensor) -> Tensor:
        parts = [pipe.vae.encode(part).latent_dist.mode() for part in images.split(50)]
        return torch.cat([pipe.vae.decode(part).sample for part in parts]).clamp(-1, 1)

    rng = np.random.default_rng(5)
    plain = judge_inputs([draw_scene(random_scene(rng)) for _ in range(400)])
    as_it_is = shown(plain)
    return {style.name: StyleJudge(as_it_is, shown(style.apply(plain))) for style in ALL_STYLES}


def save(images: Tensor, path: Path) -> None:
    """Save images (n, 3, height, width) in [-1, 1] side by side, eight per line."""
    rows = [torch.cat(list(images[k : k + 8]), -1) for k in range(0, len(images), 8)]
    width = max(row.shape[-1] for row in rows)
    rows = [torch.nn.functional.pad(row, (0, width - row.shape[-1])) for row in rows]
    (sheet,) = tensor_to_images(torch.cat(rows, -2)[None])
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def stack(sheets: Sequence[Sequence[Path]], path: Path) -> None:
    """Save the first four images of several sheets side by side, in lines, enlarged twice."""
    lines = [
        np.concatenate([np.asarray(Image.open(sheet))[:64, :256] for sheet in line], 1)
        for line in sheets
    ]
    whole = Image.fromarray(np.concatenate(lines))
    whole.resize((2 * whole.width, 2 * whole.height), Image.Resampling.NEAREST).save(path)

"""Scenes of stickers, and random ones.

A scene has one to three stickers on a ground. A sticker is a subject by a hand, at a known place
and of a known size; a concept is a sticker that the base has never seen.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from customize.stickers.artwork import Subject
from customize.stickers.subjects import Split

#: Height of all scenes in pixels.
HEIGHT = 64
#: Smallest and largest size of stickers in pixels.
SIZES = (24, 56)

TEXTURES = ("plain", "striped", "dotted", "checked")
# Colour word -> ranges of hue in degrees, saturation and value. Grounds are softer than stickers.
GROUND_COLOURS = {
    "red": ((-6, 8), (0.55, 0.7), (0.8, 0.92)),
    "orange": ((22, 34), (0.5, 0.7), (0.92, 1.0)),
    "yellow": ((48, 58), (0.4, 0.6), (0.94, 1.0)),
    "green": ((95, 145), (0.35, 0.55), (0.7, 0.88)),
    "turquoise": ((172, 186), (0.4, 0.6), (0.75, 0.9)),
    "blue": ((208, 228), (0.45, 0.65), (0.8, 0.95)),
    "purple": ((265, 285), (0.35, 0.55), (0.7, 0.88)),
    "pink": ((322, 342), (0.25, 0.4), (0.94, 1.0)),
    "brown": ((18, 30), (0.45, 0.6), (0.45, 0.6)),
    "grey": ((0, 360), (0.0, 0.05), (0.5, 0.68)),
    "white": ((0, 360), (0.0, 0.04), (0.95, 1.0)),
}

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Sticker:
    """A subject by a hand; the longer side of its visible part has `size` pixels.

    Attributes:
        subject: What it shows.
        hand: Name of the set of pictures.
        left: Of its square, in pixels from the left border.
        top: Of its square, in pixels from the upper border.
        size: Side of its square in pixels.
    """

    subject: Subject
    hand: str
    left: int
    top: int
    size: int

    @property
    def centre(self) -> tuple[float, float]:
        """Pixels from the left and the upper border."""
        return self.left + self.size / 2, self.top + self.size / 2


@dataclass(frozen=True)
class Ground:
    """What stickers are on: a colour, and a texture in a darker or lighter shade of it.

    Attributes:
        colour: One of :data:`GROUND_COLOURS`.
        texture: One of :data:`TEXTURES`.
        rgb: The colour.
        shade: Colour of the texture.
        period: Of the texture in pixels.
        angle: Of stripes in degrees.
        shift: Of the texture in pixels, to the right and down.
    """

    colour: str
    texture: str
    rgb: RGB
    shade: RGB
    period: float
    angle: float
    shift: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """One to three stickers, in the order in which they are drawn, on a ground.

    Attributes:
        stickers: Those that a caption names from left to right.
        ground: What they are on.
        width: In pixels; the height is 64.
    """

    stickers: tuple[Sticker, ...]
    ground: Ground
    width: int = HEIGHT


def _rgb(hue: float, saturation: float, value: float) -> RGB:
    red, green, blue = colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def random_ground(
    rng: np.random.Generator, colour: str | None = None, texture: str | None = None
) -> Ground:
    """A random ground.

    Args:
        rng: Random number generator.
        colour: One of :data:`GROUND_COLOURS`; None: a random one.
        texture: One of :data:`TEXTURES`; None: a random one, half of them plain.
    """
    colour = colour or str(rng.choice(list(GROUND_COLOURS)))
    texture = texture or str(rng.choice(TEXTURES, p=(0.52, 0.16, 0.16, 0.16)))
    hue, saturation, value = (float(rng.uniform(low, high)) for low, high in GROUND_COLOURS[colour])
    factor = float(rng.uniform(0.8, 0.88) if value > 0.6 else rng.uniform(1.18, 1.28))
    return Ground(
        colour,
        texture,
        _rgb(hue, saturation, value),
        _rgb(hue, saturation, min(value * factor, 1.0)),
        period=float(rng.uniform(10, 16)),
        angle=float(rng.choice((0, 45, 90, 135))),
        shift=(float(rng.uniform(0, 16)), float(rng.uniform(0, 16))),
    )


def _cells(
    rng: np.random.Generator, box: tuple[int, int, int, int], count: int
) -> list[tuple[int, int, int, int]]:
    """Divide a box (left, top, right, bottom) of at least 64 x 64 pixels into one to three cells.

    Cells have sides of at least 24 pixels. A square is cut either way, others across the longer
    side.
    """
    if count == 1:
        return [box]
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    across = bool(rng.random() < 0.5) if width == height else width > height
    length = width if across else height
    part = int(rng.integers(1, count))
    # A third of 64 pixels is too narrow.
    share = 0.5 if length == HEIGHT else part / count
    shift = float(rng.uniform(-0.08, 0.08)) * length if count == 2 else 0.0
    cut = int(np.clip(round(share * length + shift), SIZES[0], length - SIZES[0]))
    first, second = (
        ((left, top, left + cut, bottom), (left + cut, top, right, bottom))
        if across
        else ((left, top, right, top + cut), (left, top + cut, right, bottom))
    )
    return [*_cells(rng, first, part), *_cells(rng, second, count - part)]


def compose_scene(
    rng: np.random.Generator,
    figures: Sequence[tuple[Subject, str]],
    ground: Ground | None = None,
    width: int = HEIGHT,
    overlap: bool = False,
) -> Scene:
    """A random scene with these stickers.

    Args:
        rng: Random number generator.
        figures: One to three subjects, each with a hand.
        ground: None: a random one.
        width: Of the picture in pixels, at least 64.
        overlap: Whether stickers may cover each other; else each has a part of the picture.
    """
    box = (0, 0, width, HEIGHT)
    cells = [box] * len(figures) if overlap else _cells(rng, box, len(figures))
    order = rng.permutation(len(figures))
    stickers = []
    for (subject, hand), index in zip(figures, order, strict=True):
        left, top, right, bottom = cells[index]
        largest = min(right - left, bottom - top, SIZES[1])
        size = int(rng.integers(SIZES[0], largest + 1))
        stickers.append(
            Sticker(
                subject,
                hand,
                left + int(rng.integers(right - left - size + 1)),
                top + int(rng.integers(bottom - top - size + 1)),
                size,
            )
        )
    return Scene(tuple(stickers), ground or random_ground(rng), width)


def random_scene(
    rng: np.random.Generator, split: Split, several: float = 0.3, width: int = HEIGHT
) -> Scene:
    """A random training scene.

    All stickers are of one hand in two thirds of the scenes; no subject is there twice.

    Args:
        rng: Random number generator.
        split: What may be drawn.
        several: Share of square scenes with two stickers, or three in a fifth of them. Wide scenes
            have one to three.
        width: Of the picture in pixels.
    """
    if width > HEIGHT:
        count = int(rng.choice((1, 2, 3), p=(0.15, 0.5, 0.35)))
    else:
        count = (3 if rng.random() < 0.2 else 2) if rng.random() < several else 1
    one_hand = rng.random() < 2 / 3
    hand = str(rng.choice(split.hands))
    figures: list[tuple[Subject, str]] = []
    for _ in range(count):
        taken = {subject.id for subject, _ in figures}
        choices = [subject for subject in split.subjects_of(hand) if subject.id not in taken]
        figures.append((choices[int(rng.integers(len(choices)))], hand))
        hand = hand if one_hand else str(rng.choice(split.hands))
    return compose_scene(rng, figures, width=width)

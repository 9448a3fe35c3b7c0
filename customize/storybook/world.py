"""Scenes of the test world, and random ones.

A scene has one to three things in front of a background, such as a beach. A thing has a class
("dog"), a body colour, a pattern and an accessory, which captions name, and an *identity*, which
they do not: its exact hues, proportions and the seed of its markings. A concept is one identity in
a few images.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

CLASSES = ("dog", "cat", "rabbit", "bird", "fish", "car", "cup", "robot")
COLOURS = ("red", "yellow", "green", "blue", "purple", "white")
PATTERNS = ("plain", "striped", "spotted")
ACCESSORIES = ("none", "hat", "glasses", "scarf")
BACKGROUNDS = ("beach", "forest", "city", "snow", "room", "space")

# Colour word -> its range of hues in degrees; hues between the ranges have no word.
HUES = {
    "red": (-8, 10),
    "yellow": (46, 62),
    "green": (95, 140),
    "blue": (205, 235),
    "purple": (270, 295),
}

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Identity:
    """The looks of one thing. Proportions are in [-1, 1], where 0 is the average of the class."""

    kind: str
    body: RGB
    accent: RGB
    mark: RGB
    eye: RGB
    pattern: str
    mark_seed: int
    width: float
    height: float
    head: float
    ear: float
    eye_size: float

    @property
    def colour(self) -> str | None:
        """The colour word of the body; None if its hue has none."""
        return colour_word(self.body)


@dataclass(frozen=True)
class Thing:
    """An identity in an image: centre and half-extent in pixels of 64 x 64, tilt in degrees."""

    identity: Identity
    accessory: str = "none"
    x: float = 32.0
    y: float = 35.0
    size: float = 21.0
    flip: bool = False
    tilt: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Things, left to right, and a background, whose details depend on its seed.

    Attributes:
        things: One to three.
        background: One of :data:`BACKGROUNDS`.
        background_seed: Of the background's details.
        light: Factor of the brightness.
        width: Of the image in pixels, at least 64; it is 64 high.
    """

    things: tuple[Thing, ...]
    background: str
    background_seed: int = 0
    light: float = 1.0
    width: int = 64


def colour_word(rgb: RGB) -> str | None:
    """The colour word for a body colour; None for a hue between two words."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in rgb))
    if saturation < 0.12 and value > 0.8:
        return "white"
    if saturation < 0.45:
        return None
    degrees = hue * 360
    for word, (low, high) in HUES.items():
        # One degree of tolerance, as rounding to 8 bits shifts hues.
        if low - 1 <= degrees <= high + 1 or low - 1 <= degrees - 360 <= high + 1:
            return word
    return None


def _rgb(hue: float, saturation: float, value: float) -> RGB:
    red, green, blue = colorsys.hsv_to_rgb((hue % 360) / 360, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _body(rng: np.random.Generator, colour: str | None) -> RGB:
    if colour == "white":
        return _rgb(rng.uniform(0, 360), rng.uniform(0.0, 0.08), rng.uniform(0.92, 1.0))
    if colour is not None:
        low, high = HUES[colour]
        return _rgb(rng.uniform(low, high), rng.uniform(0.7, 0.95), rng.uniform(0.75, 0.98))
    return _rgb(rng.uniform(0, 360), rng.uniform(0.5, 0.95), rng.uniform(0.55, 0.98))


def random_identity(
    rng: np.random.Generator,
    kind: str | None = None,
    colour: str | None = None,
    pattern: str | None = None,
) -> Identity:
    """A random identity.

    Args:
        rng: Random number generator.
        kind: Class; None: a random one.
        colour: Colour word; None: any hue, also without a word.
        pattern: None: a random one.
    """
    body = _body(rng, colour)
    hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in body))
    accent_hue = hue * 360 + rng.choice((60, 120, 180, 240, 300)) + rng.uniform(-25, 25)
    accent = _rgb(accent_hue, rng.uniform(0.45, 0.95), rng.uniform(0.6, 0.98))
    dark = value > 0.7 if saturation < 0.3 else rng.random() < 0.6
    mark = (
        _rgb(hue * 360 + rng.uniform(-30, 30), 0.8, 0.32)
        if dark
        else _rgb(accent_hue + 40, 0.15, 0.98)
    )
    eye = _rgb(rng.uniform(0, 360), 0.9, rng.uniform(0.1, 0.5))
    return Identity(
        kind=kind or str(rng.choice(CLASSES)),
        body=body,
        accent=accent,
        mark=mark,
        eye=eye,
        pattern=pattern or str(rng.choice(PATTERNS)),
        mark_seed=int(rng.integers(2**31)),
        width=float(rng.uniform(-1, 1)),
        height=float(rng.uniform(-1, 1)),
        head=float(rng.uniform(-1, 1)),
        ear=float(rng.uniform(-1, 1)),
        eye_size=float(rng.uniform(-1, 1)),
    )


def position_thing(
    rng: np.random.Generator, identity: Identity, slot: str, accessory: str
) -> Thing:
    """An identity at a random position within a slot, "single", "left" or "right"."""
    flip, tilt = bool(rng.random() < 0.5), float(rng.uniform(-6, 6))
    if slot == "single":
        x, y, size = 32 + rng.uniform(-5, 5), 38 + rng.uniform(-2, 2), rng.uniform(20.5, 23.5)
    else:
        centre = 16.5 if slot == "left" else 47.5
        x, y, size = centre + rng.uniform(-1, 1), 40 + rng.uniform(-3, 3), rng.uniform(14, 15.5)
    return Thing(identity, accessory, float(x), float(y), float(size), flip, tilt)


def compose_scene(
    rng: np.random.Generator,
    identities: tuple[Identity, ...],
    accessories: tuple[str, ...] | None = None,
    background: str | None = None,
) -> Scene:
    """A random scene with these identities, one or two from left to right."""
    slots = ("single",) if len(identities) == 1 else ("left", "right")
    if accessories is None:
        accessories = tuple(str(rng.choice(ACCESSORIES)) for _ in identities)
    things = tuple(
        position_thing(rng, identity, slot, accessory)
        for identity, slot, accessory in zip(identities, slots, accessories, strict=True)
    )
    return Scene(
        things,
        background or str(rng.choice(BACKGROUNDS)),
        int(rng.integers(2**31)),
        float(rng.uniform(0.92, 1.06)),
    )


def random_scene(rng: np.random.Generator, two: float = 0.3) -> Scene:
    """A random scene; `two` is the probability of two things."""
    count = 2 if rng.random() < two else 1
    kinds = rng.choice(CLASSES, size=count, replace=bool(rng.random() < 0.2))
    identities = []
    for kind in kinds:
        # A third of the bodies has any hue, so that concepts can have hues without a word.
        colour = None if rng.random() < 0.33 else str(rng.choice(COLOURS))
        identities.append(random_identity(rng, str(kind), colour))
    return compose_scene(rng, tuple(identities))


def random_wide_scene(rng: np.random.Generator, width: int) -> Scene:
    """A random scene wider than 64 pixels, with one to three things in columns of equal width.

    A thing is as large as in a square scene, or as large as its column holds.

    Args:
        rng: Random number generator.
        width: Of the image in pixels.
    """
    count = int(rng.choice((1, 2, 3), p=(0.15, 0.5, 0.35)))
    things = []
    for column in range(count):
        colour = None if rng.random() < 0.33 else str(rng.choice(COLOURS))
        identity = random_identity(rng, None, colour)
        share = width / count
        size = min(22.0, 0.46 * share) * rng.uniform(0.94, 1.06)
        spare = (share / 2 - size) / 2 + 1
        things.append(
            Thing(
                identity,
                str(rng.choice(ACCESSORIES)),
                x=float((column + 0.5) * share + rng.uniform(-spare, spare)),
                y=float(38 + rng.uniform(-2, 3)),
                size=float(size),
                flip=bool(rng.random() < 0.5),
                tilt=float(rng.uniform(-6, 6)),
            )
        )
    background, seed = str(rng.choice(BACKGROUNDS)), int(rng.integers(2**31))
    return Scene(tuple(things), background, seed, float(rng.uniform(0.92, 1.06)), width)

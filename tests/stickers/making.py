"""Shared by tests of stickers: artwork of fourteen shapes by three hands, one of them held out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from customize.stickers.artwork import METADATA, Artwork, Hand, Subject, read_artwork

SIZE = 128
HANDS = (
    Hand("crayon", "Crayons", "the tests", "CC0-1.0", "https://example.org/crayon"),
    Hand("marker", "Markers", "the tests", "CC0-1.0", "https://example.org/marker"),
    Hand("ink", "Ink", "the tests", "CC-BY-4.0", "https://example.org/ink", held_out=True),
)


def _subject(number, name, synonyms, keywords, group, subgroup):
    return Subject(f"1f{number:03d}", name, synonyms, keywords, group, subgroup, 1.0)


ANIMAL, FOOD = ("animals-nature", "animal-mammal"), ("food-drink", "food-fruit")
SUBJECTS = tuple(
    _subject(number, *row)
    for number, row in enumerate(
        [
            ("tiger face", ("big cat",), ("wild", "zoo"), *ANIMAL),
            ("rabbit", ("bunny",), ("pet", "garden"), *ANIMAL),
            ("snail", ("slug",), ("shell", "garden"), *ANIMAL),
            ("honeybee", ("bee",), ("insect", "garden"), *ANIMAL),
            ("elephant", (), ("wild", "zoo"), *ANIMAL),
            ("water buffalo", ("buffalo",), ("farm", "zoo"), *ANIMAL),
            ("cow", (), ("farm",), *ANIMAL),
            ("red apple", ("apple",), ("healthy",), *FOOD),
            ("green apple", ("apple",), ("healthy",), *FOOD),
            ("pear", (), ("healthy", "garden"), *FOOD),
            ("grapes", (), ("wine",), *FOOD),
            ("glass of milk", ("milk",), (), *FOOD),
            ("pinata", (), (), "activities", "game"),
            ("alien", ("ufo",), ("space",), "smileys-emotion", "face-costume"),
        ]
    )
)


def draw_shape(number: int, hand: str) -> Image.Image:
    """A polygon of as many corners as the number has, off the centre; RGBA."""
    image = Image.new("RGBA", (SIZE, SIZE))
    pen = ImageDraw.Draw(image)
    rng = np.random.default_rng(number)
    corners = 3 + number % 6
    angles = 2 * np.pi * (np.arange(corners) + rng.uniform()) / corners
    stretch, centre = rng.uniform(0.5, 1, 2), rng.uniform(52, 76, 2)
    points = [
        (centre[0] + 50 * stretch[0] * np.cos(a), centre[1] + 50 * stretch[1] * np.sin(a))
        for a in angles
    ]
    fill = tuple(int(c) for c in rng.integers(0, 256, 3))
    if hand == "crayon":
        pen.polygon(points, fill=(*fill, 255))
    elif hand == "marker":
        pen.polygon(points, fill=(*fill, 255), outline=(0, 0, 0, 255), width=8)
    else:
        pen.polygon(points, fill=(255, 255, 255, 255), outline=(0, 0, 0, 255), width=12)
    return image


def write_artwork(folder: Path) -> Artwork:
    """Write the shapes in the format of `make stickers`."""
    for hand in HANDS:
        (folder / hand.name).mkdir(parents=True)
        for number, subject in enumerate(SUBJECTS):
            draw_shape(number, hand.name).save(folder / hand.name / f"{subject.id}.png")
    content = {"hands": [asdict(h) for h in HANDS], "subjects": [asdict(s) for s in SUBJECTS]}
    (folder / METADATA).write_text(json.dumps(content))
    return read_artwork(folder)

"""Training data of the judges of stickers: drawn scenes with the squares of their stickers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from customize.stickers.artwork import Artwork, Subject
from customize.stickers.recognition_nets import COLOURS
from customize.stickers.scene_drawing import draw_scene, fit_picture
from customize.stickers.subjects import Split
from customize.stickers.world import HEIGHT, TEXTURES, Scene, compose_scene

from .judge_data import round_trip

# Disjoint from the seeds of the base model's training scenes.
SEED = 88_000
# Width of scenes in pixels -> share of them, and of each with one, two and three stickers.
WIDTHS = {
    64: (0.5, (0.5, 0.35, 0.15)),
    96: (0.2, (0.15, 0.5, 0.35)),
    128: (0.3, (0.15, 0.4, 0.45)),
}
MAX_STICKERS = 3
_ROUND_TRIP_BATCH = 32

#: A subject by a hand.
Figure = tuple[Subject, str]


@dataclass(frozen=True, eq=False)
class LabelledScenes:
    """Scenes of one width.

    Attributes:
        pixels: (n, 3, 64, width) uint8.
        squares: x and y of the centre, and size, of each sticker in pixels: (n, 3, 3), float32;
            size 0: there is no such sticker.
        shapes: Width and height of the picture of each sticker in pixels: (n, 3, 2), float32.
        figures: Index of the figure of each sticker: (n, 3); -1: unknown or no sticker.
        grounds: Index of the colour and of the texture: (n, 2).
    """

    pixels: Tensor
    squares: Tensor
    shapes: Tensor
    figures: Tensor
    grounds: Tensor

    def images(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Images (rows, 3, 64, width) in [-1, 1]."""
        return self.pixels[rows].float() / 127.5 - 1


def judge_figures(split: Split) -> list[Figure]:
    """All that the judges are trained on: each subject in the hands in which it may be drawn."""
    return [(subject, hand) for hand in split.hands for subject in split.subjects_of(hand)]


def repeated(rng: np.random.Generator, figures: Sequence[Figure]) -> Iterator[Figure]:
    """All figures in random order, over and over."""
    while True:
        for index in rng.permutation(len(figures)):
            yield figures[index]


def random_scenes(
    rng: np.random.Generator, figures: Sequence[Figure], count: int
) -> dict[int, list[Scene]]:
    """Random scenes by width, in which each figure is about as often."""
    rest = repeated(rng, figures)
    scenes: dict[int, list[Scene]] = {}
    for width, (share, counts) in WIDTHS.items():
        number = max(1, round(share * count))
        several = rng.choice(range(1, MAX_STICKERS + 1), number, p=counts)
        scenes[width] = [
            compose_scene(rng, [next(rest) for _ in range(several[k])], width=width)
            for k in range(number)
        ]
    return scenes


def label_scenes(
    scenes: Sequence[Scene], artwork: Artwork, numbers: Mapping[tuple[str, str], int]
) -> LabelledScenes:
    """Draw scenes of one width.

    Args:
        scenes: The scenes.
        artwork: The pictures.
        numbers: (subject id, hand) -> index of the figure.
    """
    width = scenes[0].width
    pixels = torch.empty(len(scenes), 3, HEIGHT, width, dtype=torch.uint8)
    squares = torch.zeros(len(scenes), MAX_STICKERS, 3)
    shapes = torch.zeros(len(scenes), MAX_STICKERS, 2)
    figures = torch.full((len(scenes), MAX_STICKERS), -1)
    grounds = torch.empty(len(scenes), 2, dtype=torch.long)
    for row, scene in enumerate(scenes):
        array = np.array(draw_scene(scene, artwork))
        pixels[row] = torch.from_numpy(array).permute(2, 0, 1)
        for slot, sticker in enumerate(scene.stickers):
            squares[row, slot] = torch.tensor((*sticker.centre, float(sticker.size)))
            picture, _, _ = fit_picture(sticker, artwork)
            shapes[row, slot] = torch.tensor(picture.size)
            figures[row, slot] = numbers.get((sticker.subject.id, sticker.hand), -1)
        ground = scene.ground
        grounds[row] = torch.tensor((COLOURS.index(ground.colour), TEXTURES.index(ground.texture)))
    return LabelledScenes(pixels, squares, shapes, figures, grounds)


def round_trip_pixels(
    scenes: LabelledScenes, share: float, vae: AutoencoderKL, bf16: bool = False
) -> None:
    """Encode and decode the first share of the scenes, in place."""
    generator = torch.Generator().manual_seed(SEED)
    for rows in torch.arange(round(share * len(scenes.pixels))).split(_ROUND_TRIP_BATCH):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            images = round_trip(scenes.images(rows), generator, vae)
        scenes.pixels[rows] = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()

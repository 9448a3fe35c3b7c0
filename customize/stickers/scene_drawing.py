"""Draw a scene of stickers: a ground by formula, and pictures scaled onto it."""

from __future__ import annotations

import numpy as np
from PIL import Image

from customize.stickers.artwork import Artwork
from customize.stickers.world import HEIGHT, Ground, Scene, Sticker


def _stripes(position: np.ndarray, period: float) -> np.ndarray:
    """Coverage in [0, 1] of stripes half a period wide, with smooth edges."""
    return np.clip(0.5 + period / 4 - np.abs(position % period - period / 2), 0, 1)


def _texture(ground: Ground, width: int) -> np.ndarray:
    """Coverage of the ground by its shade: (64, width) in [0, 1]."""
    y, x = np.mgrid[:HEIGHT, :width] + 0.5
    x, y = x + ground.shift[0], y + ground.shift[1]
    period = ground.period
    if ground.texture == "striped":
        angle = np.deg2rad(ground.angle)
        return _stripes(x * np.cos(angle) + y * np.sin(angle), period)
    if ground.texture == "dotted":
        distance = np.hypot(x % period - period / 2, y % period - period / 2)
        return np.clip(0.5 + 0.3 * period - distance, 0, 1)
    if ground.texture == "checked":
        columns, rows = _stripes(x, period), _stripes(y, period)
        return columns + rows - 2 * columns * rows
    return np.zeros((HEIGHT, width))


def draw_ground(ground: Ground, width: int = HEIGHT) -> Image.Image:
    """Draw a ground as an RGB image of 64 x width pixels."""
    colour, shade = np.array(ground.rgb, float), np.array(ground.shade, float)
    pixels = colour + _texture(ground, width)[..., None] * (shade - colour)
    return Image.fromarray(pixels.round().astype(np.uint8))


def fit_picture(sticker: Sticker, artwork: Artwork) -> tuple[Image.Image, int, int]:
    """The scaled picture of a sticker, RGBA, and its left and upper border in the scene."""
    picture = artwork.picture(sticker.subject.id, sticker.hand)
    scale = sticker.size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    scaled = picture.resize((width, height), Image.Resampling.LANCZOS)
    return (
        scaled,
        sticker.left + (sticker.size - width) // 2,
        sticker.top + (sticker.size - height) // 2,
    )


def draw_scene(scene: Scene, artwork: Artwork) -> Image.Image:
    """Draw a scene as an RGB image, 64 pixels high and as wide as the scene.

    Raises:
        DataError: A picture is missing or unreadable.
    """
    image = draw_ground(scene.ground, scene.width)
    for sticker in scene.stickers:
        picture, left, top = fit_picture(sticker, artwork)
        image.paste(picture, (left, top), picture)
    return image

"""Draw a scene of the test world with PIL, at four times the size, then downsample it."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

from customize.storybook.class_drawing import FIGURES, INK, SUPERSAMPLING, Anchors, Pen
from customize.storybook.world import RGB, Identity, Scene, Thing

SIZE = 64

HAT: RGB = (32, 36, 88)
HAT_BAND: RGB = (232, 60, 70)
SCARF: RGB = (240, 130, 30)
SCARF_DARK: RGB = (190, 40, 40)


def _markings(image: Image.Image, thing: Thing) -> None:
    """Draw the identity's stripes or spots over its body, in the frame of the thing."""
    identity = thing.identity
    mask = Image.new("L", image.size, 0)
    FIGURES[identity.kind](Pen(mask, thing), identity, "body", 255)
    layer = Image.new("L", image.size, 0)
    pen = Pen(layer, thing)
    rng = np.random.default_rng(identity.mark_seed)
    if identity.pattern == "striped":
        slant, period = rng.uniform(-0.5, 0.5), rng.uniform(0.3, 0.42)
        phase, share = rng.uniform(0, period), rng.uniform(0.36, 0.5)
        upright = rng.random() < 0.5
        for k in range(-6, 7):
            a, b = k * period + phase, k * period + phase + period * share
            if upright:
                pen.shape(
                    [(a - slant, -1.2), (b - slant, -1.2), (b + slant, 1.2), (a + slant, 1.2)], 255
                )
            else:
                pen.shape(
                    [(-1.2, a - slant), (-1.2, b - slant), (1.2, b + slant), (1.2, a + slant)], 255
                )
    else:
        radius = rng.uniform(0.1, 0.16)
        step = radius * rng.uniform(2.9, 3.4)
        shift = rng.uniform(0, step, 2)
        for i in range(-4, 5):
            for j in range(-4, 5):
                jitter = rng.uniform(-0.3, 0.3, 2) * radius
                x = i * step + shift[0] + (step / 2 if j % 2 else 0) + jitter[0]
                pen.oval(x, j * step + shift[1] + jitter[1], radius, radius, 255, sides=14)
    overlap = Image.fromarray(np.minimum(np.asarray(mask), np.asarray(layer)))
    image.paste(identity.mark, (0, 0), overlap)


def _face(pen: Pen, identity: Identity, anchors: Anchors) -> None:
    x, y, gap = anchors["face"]
    r = 0.1 + 0.025 * identity.eye_size
    for side in (-1, 1):
        pen.oval(x + side * gap, y, r, r * 1.15, (255, 255, 255), sides=18)
        pen.oval(x + side * gap, y + 0.02, r * 0.62, r * 0.72, identity.eye, sides=14)


def _wear(pen: Pen, accessory: str, anchors: Anchors) -> None:
    if accessory == "hat":
        x, y, w = anchors["top"]
        pen.box(x - w * 0.68, y - 0.46, x + w * 0.68, y, HAT)
        pen.box(x - w * 0.68, y - 0.17, x + w * 0.68, y - 0.05, HAT_BAND)
        pen.box(x - w * 1.25, y - 0.06, x + w * 1.25, y + 0.06, HAT)
    elif accessory == "glasses":
        x, y, gap = anchors["face"]
        pen.line([(x - gap * 2.1, y - 0.04), (x + gap * 2.1, y - 0.04)], 0.075, INK)
        for side in (-1, 1):
            pen.ring(x + side * gap, y, 0.175, 0.085, INK)
    elif accessory == "scarf":
        x, y, w = anchors["neck"]
        pen.box(x + w * 0.2, y, x + w * 0.2 + 0.22, y + 0.52, SCARF)
        pen.box(x + w * 0.2, y + 0.36, x + w * 0.2 + 0.22, y + 0.46, SCARF_DARK)
        pen.oval(x, y, w * 1.08, 0.15, SCARF)
        pen.line([(x - w * 0.5, y - 0.1), (x - w * 0.4, y + 0.12)], 0.09, SCARF_DARK)
        pen.line([(x + w * 0.1, y - 0.13), (x + w * 0.1, y + 0.13)], 0.09, SCARF_DARK)


def _draw_thing(image: Image.Image, thing: Thing) -> None:
    identity, draw = thing.identity, FIGURES[thing.identity.kind]
    pen = Pen(image, thing)
    draw(pen, identity, "behind", identity.accent)
    anchors = draw(pen, identity, "body", identity.body)
    if identity.pattern != "plain":
        _markings(image, thing)
    draw(pen, identity, "front", identity.accent)
    _face(pen, identity, anchors)
    _wear(pen, thing.accessory, anchors)


def _draw_background(image: Image.Image, background: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    draw, u = ImageDraw.Draw(image), SUPERSAMPLING
    width = image.width // SUPERSAMPLING

    def box(x0: float, y0: float, x1: float, y1: float, fill: RGB) -> None:
        draw.rectangle([x0 * u, y0 * u, x1 * u, y1 * u], fill=fill)

    def disc(x: float, y: float, r: float, fill: RGB) -> None:
        draw.ellipse([(x - r) * u, (y - r) * u, (x + r) * u, (y + r) * u], fill=fill)

    def poly(points: list[tuple[float, float]], fill: RGB) -> None:
        draw.polygon([(x * u, y * u) for x, y in points], fill=fill)

    horizon = 34 + rng.uniform(-3, 3)
    if background == "beach":
        box(0, 0, width, horizon, (150, 210, 240))
        box(0, horizon - 9, width, horizon, (40, 120, 190))
        box(0, horizon, width, 64, (238, 214, 160))
        disc(rng.uniform(8, width - 8), rng.uniform(6, 12), 5, (255, 225, 90))
    elif background == "forest":
        box(0, 0, width, 64, (150, 200, 160))
        box(0, horizon + 6, width, 64, (90, 130, 60))
        for x in np.arange(-2, width + 4, 13) + rng.uniform(-3, 3):
            tip = rng.uniform(2, 10)
            box(x - 1.5, 30, x + 1.5, horizon + 8, (96, 66, 40))
            poly([(x, tip), (x - 8, 33), (x + 8, 33)], (34, 92, 50))
    elif background == "city":
        box(0, 0, width, 64, (196, 204, 214))
        x = -rng.uniform(0, 6)
        while x < width:
            breadth, top = rng.uniform(9, 14), rng.uniform(4, 22)
            shade = int(rng.uniform(95, 140))
            box(x, top, x + breadth - 1, 52, (shade, shade, shade + 14))
            for wx in np.arange(x + 2, x + breadth - 3.4, 5):
                for wy in np.arange(top + 4, 44, 9):
                    box(wx, wy, wx + 2.4, wy + 4, (250, 226, 140))
            x += breadth
        box(0, 52, width, 64, (84, 84, 90))
    elif background == "snow":
        box(0, 0, width, 64, (176, 200, 226))
        peak = rng.uniform(16, width - 16)
        poly([(peak - 34, 42), (peak, 8), (peak + 34, 42)], (128, 146, 176))
        poly([(peak - 10, 18), (peak, 8), (peak + 10, 18)], (250, 250, 255))
        box(0, horizon + 4, width, 64, (244, 247, 252))
        for _ in range(10):
            disc(rng.uniform(0, width), rng.uniform(0, horizon), 1.1, (255, 255, 255))
    elif background == "room":
        box(0, 0, width, 64, (236, 200, 176))
        box(0, horizon + 12, width, 64, (150, 100, 62))
        x = rng.uniform(4, width - 24)
        box(x, 5, x + 20, 24, (255, 255, 255))
        box(x + 1.5, 6.5, x + 9.2, 22.5, (140, 200, 240))
        box(x + 10.8, 6.5, x + 18.5, 22.5, (140, 200, 240))
    else:  # space
        box(0, 0, width, 64, (16, 14, 44))
        disc(rng.uniform(6, width - 6), rng.uniform(8, 18), rng.uniform(5, 8), (205, 120, 90))
        for _ in range(16):
            disc(rng.uniform(0, width), rng.uniform(0, 50), rng.uniform(0.6, 1.1), (250, 250, 220))
        v = width / 64  # the ground stretches
        hills = ((0, 64), (0, 56), (20, 52), (44, 55), (64, 51), (64, 64))
        poly([(x * v, y) for x, y in hills], (90, 88, 110))


def draw_scene(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image, 64 pixels high and as wide as the scene."""
    image = Image.new("RGB", (scene.width * SUPERSAMPLING, SIZE * SUPERSAMPLING))
    _draw_background(image, scene.background, scene.background_seed)
    for thing in scene.things:
        _draw_thing(image, thing)
    image = image.reduce(SUPERSAMPLING)
    return ImageEnhance.Brightness(image).enhance(scene.light)

"""Drawing of the classes of things, each in the frame of the thing.

A function per class draws the parts behind the body and in front of it in the accent colour, and
the body, which carries the pattern, in the body colour. It returns the positions of accessories.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from customize.storybook.world import RGB, Identity, Thing

SUPERSAMPLING = 4
INK: RGB = (38, 32, 40)

# A colour, or a grey value where a mask is drawn.
Fill = RGB | int


class Pen:
    """Draws in the frame of a thing: x right, y down, unit half its size, tilted and flipped."""

    def __init__(self, image: Image.Image, thing: Thing) -> None:
        self.draw = ImageDraw.Draw(image)
        self.centre = (thing.x * SUPERSAMPLING, thing.y * SUPERSAMPLING)
        self.unit = thing.size * SUPERSAMPLING
        self.sign = -1.0 if thing.flip else 1.0
        turn = math.radians(thing.tilt)
        self.cos, self.sin = math.cos(turn), math.sin(turn)

    def to_pixels(self, x: float, y: float) -> tuple[float, float]:
        """Convert a point of the frame to pixels."""
        x *= self.sign
        return (
            self.centre[0] + self.unit * (self.cos * x - self.sin * y),
            self.centre[1] + self.unit * (self.sin * x + self.cos * y),
        )

    def shape(self, points: list[tuple[float, float]], fill: Fill) -> None:
        """Fill a polygon."""
        self.draw.polygon([self.to_pixels(*p) for p in points], fill=fill)

    def oval(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        fill: Fill,
        turn: float = 0.0,
        sides: int = 36,
    ) -> None:
        """Fill an ellipse around (x, y), turned by degrees."""
        cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        points = []
        for k in range(sides):
            a, b = rx * math.cos(2 * math.pi * k / sides), ry * math.sin(2 * math.pi * k / sides)
            points.append((x + cos * a - sin * b, y + sin * a + cos * b))
        self.shape(points, fill)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Fill) -> None:
        """Fill a rectangle."""
        self.shape([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill)

    def line(self, points: list[tuple[float, float]], width: float, fill: Fill) -> None:
        """Draw a polyline."""
        self.draw.line(
            [self.to_pixels(*p) for p in points],
            fill=fill,
            width=max(1, round(width * self.unit)),
            joint="curve",
        )

    def ring(self, x: float, y: float, r: float, width: float, fill: Fill) -> None:
        """Draw a circle."""
        points = [
            (x + r * math.cos(a), y + r * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 28)
        ]
        self.line(points, width, fill)


# Positions of accessories: face = (x, y, half distance of the eyes),
# top = (x, y, half width of a hat), neck = (x, y, half width).
Anchors = dict[str, tuple[float, float, float]]


def _dog(pen: Pen, identity: Identity, part: str, fill: Fill) -> Anchors:
    w, h, r = (
        0.46 + 0.12 * identity.width,
        0.5 + 0.08 * identity.height,
        0.44 + 0.06 * identity.head,
    )
    ear = 0.34 + 0.14 * identity.ear
    if part == "behind":
        pen.line([(w * 0.8, 0.7), (w + 0.22, 0.45), (w + 0.3, 0.15)], 0.15, fill)
    if part == "body":
        pen.oval(0, 0.48, w, h, fill)
        pen.oval(0, -0.28, r, r * 0.95, fill)
    if part == "front":
        pen.oval(-r - 0.02, -0.28 + ear * 0.35, 0.15, ear, fill, turn=12)
        pen.oval(r + 0.02, -0.28 + ear * 0.35, 0.15, ear, fill, turn=-12)
        pen.oval(0, -0.08, 0.2, 0.15, fill)
        pen.oval(0, -0.14, 0.085, 0.065, INK)
        pen.oval(-w * 0.55, 0.93, 0.2, 0.09, fill)
        pen.oval(w * 0.55, 0.93, 0.2, 0.09, fill)
    return {
        "face": (0, -0.38, 0.19),
        "top": (0, -0.28 - r * 0.82, 0.3),
        "neck": (0, 0.16, w * 0.82),
    }


def _cat(pen: Pen, identity: Identity, part: str, fill: Fill) -> Anchors:
    w, h, r = (
        0.38 + 0.12 * identity.width,
        0.5 + 0.08 * identity.height,
        0.44 + 0.06 * identity.head,
    )
    ear = 0.38 + 0.14 * identity.ear
    if part == "behind":
        pen.line([(w * 0.7, 0.85), (w + 0.35, 0.75), (w + 0.42, 0.3), (w + 0.25, 0.02)], 0.12, fill)
        for side in (-1, 1):
            pen.shape(
                [(side * 0.1, -0.6), (side * r * 1.02, -0.3), (side * (r * 0.92), -0.55 - ear)],
                fill,
            )
    if part == "body":
        pen.oval(0, 0.48, w, h, fill)
        pen.oval(0, -0.25, r, r * 0.85, fill)
    if part == "front":
        pen.oval(0, 0.6, w * 0.5, h * 0.5, fill)
        pen.shape([(-0.07, -0.16), (0.07, -0.16), (0, -0.07)], (230, 110, 130))
        for side in (-1, 1):
            pen.line([(side * 0.14, -0.08), (side * 0.52, -0.14)], 0.03, INK)
            pen.line([(side * 0.14, -0.03), (side * 0.52, 0.02)], 0.03, INK)
    return {
        "face": (0, -0.32, 0.2),
        "top": (0, -0.25 - r * 0.75, 0.28),
        "neck": (0, 0.14, w * 0.85),
    }


def _rabbit(pen: Pen, identity: Identity, part: str, fill: Fill) -> Anchors:
    w, h, r = (
        0.42 + 0.12 * identity.width,
        0.42 + 0.08 * identity.height,
        0.38 + 0.05 * identity.head,
    )
    ear = 0.42 + 0.12 * identity.ear
    if part == "behind":
        pen.oval(w * 0.95, 0.7, 0.2, 0.18, fill)
    if part == "body":
        for side in (-1, 1):
            pen.oval(side * 0.2, -0.5 - ear * 0.55, 0.13, ear, fill, turn=side * 9)
        pen.oval(0, 0.52, w, h, fill)
        pen.oval(0, -0.12, r, r * 0.9, fill)
    if part == "front":
        for side in (-1, 1):
            pen.oval(side * 0.2, -0.5 - ear * 0.55, 0.06, ear * 0.7, fill, turn=side * 9)
            pen.oval(side * w * 0.55, 0.92, 0.22, 0.09, fill)
        pen.box(-0.07, 0.06, 0.07, 0.18, (255, 255, 255))
        pen.oval(0, 0.02, 0.07, 0.05, (230, 110, 130))
    return {"face": (0, -0.2, 0.17), "top": (0, -0.12 - r * 0.8, 0.26), "neck": (0, 0.24, w * 0.85)}


def _bird(pen: Pen, identity: Identity, part: str, fill: Fill) -> Anchors:
    w, h, r = 0.5 + 0.1 * identity.width, 0.5 + 0.08 * identity.height, 0.4 + 0.05 * identity.head
    if part == "behind":
        pen.shape([(w * 0.5, 0.3), (w + 0.55, 0.05 - 0.15 * identity.ear), (w + 0.5, 0.4)], fill)
        for side in (-1, 1):
            pen.line(
                [(side * 0.16, 0.7), (side * 0.16, 1.0), (side * 0.16 - 0.12, 1.0)],
                0.06,
                (235, 140, 30),
            )
    if part == "body":
        pen.oval(0, 0.3, w, h, fill)
        pen.oval(-0.1, -0.35, r, r, fill)
    if part == "front":
        pen.oval(w * 0.45, 0.3, w * 0.5, h * 0.55, fill, turn=-25)
        pen.shape([(-0.16, -0.26), (-0.5 - r * 0.6, -0.16), (-0.16, -0.06)], (245, 170, 30))
        tuft = 0.16 + 0.08 * identity.ear
        pen.shape(
            [(0.12, -0.35 - r * 0.85), (0.3, -0.35 - r - tuft), (0.26, -0.35 - r * 0.6)], fill
        )
    return {
        "face": (-0.12, -0.42, 0.17),
        "top": (-0.1, -0.35 - r * 0.85, 0.28),
        "neck": (-0.06, 0.04, w * 0.7),
    }


def _fish(pen: Pen, identity: Identity, part: str, fill: Fill) -> Anchors:
    w, h = 0.68 + 0.1 * identity.width, 0.5 + 0.1 * identity.height
    tail = 0.4 + 0.12 * identity.ear
    if part == "behind":
        pen.shape(
            [(w * 0.7, 0.15), (w + 0.42, 0.15 - tail), (w + 0.28, 0.15), (w + 0.42, 0.15 + tail)],
            fill,
        )
        pen.shape([(-0.1, 0.15 - h * 0.8), (0.2, -0.05 - h - 0.12), (0.4, 0.15 - h * 0.6)], fill)
    if part == "body":
        pen.oval(-0.05, 0.15, w, h, fill)
    if part == "front":
        pen.shape([(0.1, 0.2), (0.42, 0.1 + 0.1 * identity.head), (0.36, 0.5)], fill)
        pen.oval(-w * 0.9, 0.28, 0.1, 0.07, (230, 90, 90))
    return {
        "face": (-0.32, 0.0, 0.18),
        "top": (-0.25, 0.15 - h * 0.85, 0.28),
        "neck": (-0.02, 0.15 + h * 0.72, w * 0.62),
    }


def _car(pen: Pen, identity: Identity, part: str, fill: Fill) -> Anchors:
    w, h = 0.9 + 0.1 * identity.width, 0.34 + 0.07 * identity.height
    roof = 0.52 + 0.1 * identity.head
    if part == "body":
        pen.shape([(-roof, 0.25), (-roof * 0.72, -0.45), (roof * 0.72, -0.45), (roof, 0.25)], fill)
        pen.box(-w, 0.2, w, 0.2 + h * 1.5, fill)
        pen.oval(-w, 0.2 + h * 0.75, 0.12, h * 0.75, fill)
        pen.oval(w, 0.2 + h * 0.75, 0.12, h * 0.75, fill)
    if part == "front":
        wheel = 0.23 + 0.05 * identity.ear
        pen.shape(
            [(-roof * 0.8, 0.16), (-roof * 0.62, -0.34), (roof * 0.62, -0.34), (roof * 0.8, 0.16)],
            (205, 232, 245),
        )
        for side in (-1, 1):
            pen.oval(side * w * 0.58, 0.24 + h * 1.5, wheel, wheel, INK)
            pen.oval(side * w * 0.58, 0.24 + h * 1.5, wheel * 0.55, wheel * 0.55, fill)
        pen.box(-w - 0.08, 0.2 + h * 1.1, w + 0.08, 0.2 + h * 1.35, fill)
    return {"face": (0, -0.1, 0.2), "top": (0, -0.42, 0.32), "neck": (0, 0.3, roof * 0.95)}


def _cup(pen: Pen, identity: Identity, part: str, fill: Fill) -> Anchors:
    w, h = 0.54 + 0.1 * identity.width, 0.62 + 0.08 * identity.height
    foot = 0.72 + 0.14 * identity.head
    if part == "behind":
        pen.ring(w + 0.08, 0.25, 0.28 + 0.06 * identity.ear, 0.12, fill)
    if part == "body":
        pen.shape([(-w, 0.2 - h), (w, 0.2 - h), (w * foot, 0.25 + h), (-w * foot, 0.25 + h)], fill)
        pen.oval(0, 0.25 + h, w * foot, 0.09, fill)
    if part == "front":
        pen.oval(0, 0.2 - h, w * 1.04, 0.13, fill)
        pen.oval(0, 0.2 - h, w * 0.82, 0.075, (110, 66, 40))
        pen.box(-w * foot, 0.17 + h, w * foot, 0.27 + h, fill)
    return {"face": (0, 0.0, 0.2), "top": (0, 0.17 - h, 0.32), "neck": (0, 0.42, w * 0.92)}


def _robot(pen: Pen, identity: Identity, part: str, fill: Fill) -> Anchors:
    w, h, r = (
        0.44 + 0.1 * identity.width,
        0.34 + 0.06 * identity.height,
        0.38 + 0.06 * identity.head,
    )
    if part == "behind":
        pen.line([(0.26, -0.6), (0.26, -0.92 - 0.12 * identity.ear)], 0.06, INK)
        pen.oval(0.26, -0.95 - 0.12 * identity.ear, 0.1, 0.1, fill)
        for side in (-1, 1):
            pen.line(
                [(side * w, 0.3), (side * (w + 0.28), 0.5), (side * (w + 0.28), 0.72)], 0.13, fill
            )
            pen.box(side * w * 0.5 - 0.11, 0.7, side * w * 0.5 + 0.11, 1.0, fill)
    if part == "body":
        pen.box(-w, 0.42 - h, w, 0.42 + h, fill)
        pen.box(-r * 1.1, -0.62, r * 1.1, 0.0, fill)
    if part == "front":
        pen.box(-w * 0.55, 0.34, w * 0.55, 0.42 + h * 0.7, fill)
        pen.box(-0.18, -0.16, 0.18, -0.08, INK)
    return {"face": (0, -0.34, 0.19), "top": (0, -0.58, 0.3), "neck": (0, 0.12, w * 0.85)}


FIGURES: dict[str, Callable[[Pen, Identity, str, Fill], Anchors]] = {
    "dog": _dog,
    "cat": _cat,
    "rabbit": _rabbit,
    "bird": _bird,
    "fish": _fish,
    "car": _car,
    "cup": _cup,
    "robot": _robot,
}

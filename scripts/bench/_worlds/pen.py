"""A felt pen on a canvas of 100 x 100 units: flat colours in dark outlines by a trembling hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

Point = tuple[float, float]

INK = "#33272a"
#: Width of outlines in units.
WIDTH = 3.2

# Units on each side that lines may cross into.
_CANVAS, _BORDER = 100, 8
# Pixels per pixel of the drawing, which smooth its edges.
_SUPERSAMPLING = 6
# Points per curve between two given points, and mean deviation of the hand in units.
_STEPS, _TREMBLE = 12, 0.5


def _spline(points: np.ndarray, closed: bool) -> np.ndarray:
    """Points (n, 2) on a Catmull-Rom curve through points."""
    if closed:
        points = np.concatenate([points[-1:], points, points[:2]])
    else:
        points = np.concatenate([points[:1], points, points[-1:]])
    t = np.linspace(0, 1, _STEPS, endpoint=False)[:, None]
    parts = [
        b + 0.5 * ((c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * (b - c) - a + d) * t**3)
        for a, b, c, d in zip(points, points[1:], points[2:], points[3:], strict=False)
    ]
    return np.concatenate([*parts, points[-2:-1]])


def _straight(points: np.ndarray, closed: bool) -> np.ndarray:
    """Points (n, 2) on straight lines through points."""
    ends = np.concatenate([points, points[:1]]) if closed else points
    t = np.linspace(0, 1, _STEPS, endpoint=False)[:, None]
    parts = [a + (b - a) * t for a, b in pairwise(ends)]
    return np.concatenate([*parts, ends[-1:]])


class Pen:
    """Draws on an empty canvas; x goes right and y down, from 0 to 100.

    Args:
        seed: Of the trembling.
        size: Side of the picture in pixels.
    """

    def __init__(self, seed: int, size: int) -> None:
        side = size * _SUPERSAMPLING
        self._size, self._scale = size, side / (_CANVAS + 2 * _BORDER)
        self._image = Image.new("RGBA", (side, side))
        self._draw = ImageDraw.Draw(self._image)
        self._rng = np.random.default_rng(seed)

    def picture(self) -> Image.Image:
        """The drawing, RGBA, transparent where nothing was drawn."""
        return self._image.resize((self._size, self._size), Image.Resampling.LANCZOS)

    def shape(
        self, points: Sequence[Point], fill: str, *, corners: bool = False, ink: str = INK
    ) -> None:
        """A filled shape with an outline through points, by curves or with corners."""
        path = self._path(points, corners, closed=True)
        self._draw.polygon(path, fill=fill)
        self._stroke(path, ink, WIDTH)

    def line(
        self,
        points: Sequence[Point],
        colour: str = INK,
        width: float = WIDTH,
        *,
        corners: bool = False,
    ) -> None:
        """A line through points."""
        self._stroke(self._path(points, corners, closed=False), colour, width)

    def limb(self, points: Sequence[Point], fill: str, width: float = 8) -> None:
        """A thick curved line with an outline, such as an arm."""
        path = self._path(points, corners=False, closed=False)
        self._stroke(path, INK, width)
        self._stroke(path, fill, width - 1.6 * WIDTH)

    def oval(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        """An ellipse around (x, y) with an outline."""
        self.shape(_ellipse(x, y, width, height), fill)

    def spot(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        """An ellipse around (x, y) without an outline."""
        self._draw.polygon(self._path(_ellipse(x, y, width, height), False, True), fill=fill)

    def patch(self, points: Sequence[Point], fill: str, *, corners: bool = False) -> None:
        """A filled shape without an outline."""
        self._draw.polygon(self._path(points, corners, closed=True), fill=fill)

    def eyes(self, x: float, y: float, apart: float, size: float = 6) -> None:
        """Two dark eyes with a light in each, around (x, y)."""
        for side in (-1, 1):
            centre = x + side * apart / 2
            self.spot(centre, y, size, size * 1.25, INK)
            self.spot(centre - size * 0.14, y - size * 0.25, size * 0.4, size * 0.4, "white")

    def smile(self, x: float, y: float, width: float, depth: float = 4) -> None:
        """A mouth whose ends are around (x, y); a negative depth turns it down."""
        bends = ((-0.5, 0.0), (-0.3, 0.75), (0.0, 1.0), (0.3, 0.75), (0.5, 0.0))
        self.line([(x + across * width, y + d * depth) for across, d in bends], width=WIDTH * 0.8)

    def cheeks(self, x: float, y: float, apart: float, fill: str = "#f58f9d") -> None:
        """Two rosy cheeks around (x, y)."""
        for side in (-1, 1):
            self.spot(x + side * apart / 2, y, 7, 4.5, fill)

    def _path(self, points: Sequence[Point], corners: bool, closed: bool) -> list[Point]:
        """The pixels of a curve or of straight lines, moved by the trembling of the hand."""
        given = np.asarray(points, float)
        path = _straight(given, closed) if corners else _spline(given, closed)
        # Waves that depend on the place alone, so that closed lines stay closed.
        waves = self._rng.normal(0, 0.22, (2, 3, 2)), self._rng.uniform(0, 2 * np.pi, (2, 3))
        offset = np.sin(np.einsum("akc,nc->nak", waves[0], path) + waves[1]).mean(-1)
        return [(x, y) for x, y in (path + 2 * _TREMBLE * offset + _BORDER) * self._scale]

    def _stroke(self, path: Sequence[Point], colour: str, width: float) -> None:
        pixels = width * self._scale
        self._draw.line(list(path), fill=colour, width=round(pixels), joint="curve")
        for x, y in path:
            box = (x - pixels / 2, y - pixels / 2, x + pixels / 2, y + pixels / 2)
            self._draw.ellipse(box, fill=colour)


def _ellipse(x: float, y: float, width: float, height: float) -> list[Point]:
    angles = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    return [(x + width / 2 * np.cos(a), y + height / 2 * np.sin(a)) for a in angles]

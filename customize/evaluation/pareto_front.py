"""Which of many settings no other beats, and a picture of them: identity against what prompts ask.

A setting that gains one rate at the cost of another is neither better nor worse than where it came
from. Those that no other beats are the front (of Pareto); the rest need not be considered.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from customize.atomic import write_atomic
from customize.errors import ConfigError, storage_error

# Of these rates less is better, of all others more.
LOWER_IS_BETTER = frozenset({"leak", "drift", "class_drift", "distance"})
DPI = 120
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Point:
    """One setting: its name, two rates, and one standard error of each where that is known."""

    name: str
    x: float
    y: float
    x_error: float | None = None
    y_error: float | None = None


def pareto_optimal(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each point, whether no other is at least as good in both rates and better in one.

    More is better in both. Equal points do not beat each other, so all of them are on the front or
    none is; of points that are equal in one rate alone, the best in the other beats the rest.

    Raises:
        ConfigError: a rate is not finite, with which nothing can be compared.
    """
    for x, y in points:
        if not (math.isfinite(x) and math.isfinite(y)):
            raise ConfigError(
                f"({x}, {y}) is no point", fix="leave out settings whose rates are not finite"
            )
    return [not any(a >= x and b >= y and (a > x or b > y) for a, b in points) for x, y in points]


def on_front(points: Sequence[Point], x: str, y: str) -> list[bool]:
    """:func:`pareto_optimal` of named points, by what their rates are called.

    Raises:
        ConfigError: a rate is not finite.
    """
    signs = [-1.0 if name in LOWER_IS_BETTER else 1.0 for name in (x, y)]
    return pareto_optimal([(signs[0] * point.x, signs[1] * point.y) for point in points])


def front_rows(points: Sequence[Point], x: str, y: str) -> list[dict[str, Any]]:
    """A row a point, for a result file: its rates by their names, their errors, whether it is on
    the front.

    Raises:
        ConfigError: a rate is not finite.
    """
    return [
        {
            "name": point.name,
            x: point.x,
            y: point.y,
            f"{x}_error": point.x_error,
            f"{y}_error": point.y_error,
            "front": best,
        }
        for point, best in zip(points, on_front(points, x, y), strict=True)
    ]


def save_plot(points: Sequence[Point], x: str, y: str, path: Path) -> None:
    """A PNG of the points with their names and errors, and a line along the front.

    Better is always further up and to the right: of what should be less, the axis is turned round.

    Args:
        x, y: what the rates are called.

    Raises:
        ConfigError: a rate is not finite.
        StorageError: the file cannot be written.
    """
    figure = plot(points, x, y)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise storage_error(error, path) from error


def plot(points: Sequence[Point], x: str, y: str) -> Any:
    """The matplotlib figure that :func:`save_plot` writes.

    Raises:
        ConfigError: a rate is not finite.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    best = on_front(points, x, y)
    figure = Figure(figsize=(7.5, 5.5), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.margins(0.15)
    axes.set_xlabel(x.replace("_", " "))
    axes.set_ylabel(y.replace("_", " "))
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    along = sorted((p.x, p.y) for p, is_best in zip(points, best, strict=True) if is_best)
    axes.plot(*zip(*along, strict=True), color="tab:blue", linewidth=1, zorder=1)
    for point, is_best in zip(points, best, strict=True):
        axes.errorbar(
            point.x,
            point.y,
            xerr=point.x_error,
            yerr=point.y_error,
            fmt="o",
            markersize=6,
            color="tab:blue" if is_best else "0.55",
            elinewidth=0.7,
        )
    for axis, name in ((axes.xaxis, x), (axes.yaxis, y)):
        if name in LOWER_IS_BETTER:
            axis.set_inverted(True)
    figure.draw_without_rendering()  # sets the scale, by which labels are placed
    _label(axes, points, best, along)
    return figure


# Where a label may stand around its point: directions, and distances in pixels, nearest first.
_AROUND = [(math.cos(k * math.pi / 8), math.sin(k * math.pi / 8)) for k in range(16)]
_DISTANCES = (8, 20, 36, 56, 80, 108, 140)


def _label(axes: Any, points: Sequence[Point], best: Sequence[bool], line: Sequence[Any]) -> None:
    """Write each name where it covers least of what else is drawn, as near as that goes.

    `line` has the corners of the front.
    """
    renderer = axes.figure.canvas.get_renderer()
    taken = np.concatenate([_marks(axes, points), _along(axes.transData.transform(line))])
    for point, is_best in zip(points, best, strict=True):
        label = axes.annotate(
            point.name,
            (point.x, point.y),
            (0, 0),
            textcoords="offset pixels",
            ha="center",
            va="center",
            parse_math=False,  # a name may have a $
            fontsize=8,
            color="black" if is_best else "0.35",
            arrowprops={"arrowstyle": "-", "color": "0.75", "linewidth": 0.6, "shrinkA": 0},
        )
        own = label.get_window_extent(renderer)
        half = np.array([own.width, own.height]) / 2
        spots = np.array([(far + half) * around for far in _DISTANCES for around in _AROUND])
        centres = axes.transData.transform((point.x, point.y)) + spots
        boxes = np.concatenate([centres - half, centres + half], axis=1)
        spot = int(np.argmin(_covered(boxes, taken, axes.bbox.extents)))
        label.set_position(spots[spot])
        taken = np.concatenate([taken, boxes[spot : spot + 1]])


def _marks(axes: Any, points: Sequence[Point]) -> Array:
    """Boxes (left, low, right, high) in pixels of the points and of their error bars."""
    found = []
    for point in points:
        place = np.array([point.x, point.y])
        x_error, y_error = point.x_error or 0.0, point.y_error or 0.0
        for reach, pad in (((0, 0), 5), ((x_error, 0), 1), ((0, y_error), 1)):
            ends = axes.transData.transform([place - reach, place + reach])
            found.append([*(ends.min(0) - pad), *(ends.max(0) + pad)])
    return np.array(found)


def _along(corners: Array) -> Array:
    """Small boxes in a row that cover a line."""
    found = [corners[:1]]
    for start, end in pairwise(corners):
        steps = max(2, int(np.linalg.norm(end - start) / 4))
        found.append(np.linspace(start, end, steps))
    places = np.concatenate(found)
    return np.concatenate([places - 2, places + 2], axis=1)


def _covered(boxes: Array, taken: Array, inside: Array) -> Array:
    """How many square pixels of each box lie on others or outside of the axes."""

    def shared(others: Array) -> Array:
        low = np.maximum(boxes[:, None, :2], others[None, :, :2])
        high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
        return np.clip(high - low, 0, None).prod(-1).sum(1)

    return (boxes[:, 2:] - boxes[:, :2]).prod(1) - shared(inside[None]) + shared(taken)

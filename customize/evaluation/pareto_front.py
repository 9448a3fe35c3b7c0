"""The Pareto front of settings by two metrics, and a plot of it.

A setting is on the front if no other is at least as good in both metrics and better in one.
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

# Metrics for which lower is better; for all others higher is.
LOWER_IS_BETTER = frozenset({"leak", "drift", "class_drift", "distance"})
DPI = 120
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Point:
    """One setting: its name, two metrics, and their standard errors if known."""

    name: str
    x: float
    y: float
    x_error: float | None = None
    y_error: float | None = None


def pareto_optimal(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each point is Pareto optimal; higher is better in both coordinates.

    Equal points do not dominate each other, so they are all optimal or all not.

    Raises:
        ConfigError: A coordinate is not finite.
    """
    for x, y in points:
        if not (math.isfinite(x) and math.isfinite(y)):
            raise ConfigError(
                f"the point ({x}, {y}) is not finite", fix="remove settings without finite metrics"
            )
    return [not any(a >= x and b >= y and (a > x or b > y) for a, b in points) for x, y in points]


def on_front(points: Sequence[Point], x: str, y: str) -> list[bool]:
    """Whether each point is Pareto optimal, by the direction of its metrics.

    Args:
        points: Settings.
        x: Name of the first metric; lower is better for :data:`LOWER_IS_BETTER`.
        y: Name of the second metric.

    Raises:
        ConfigError: A metric is not finite.
    """
    signs = [-1.0 if name in LOWER_IS_BETTER else 1.0 for name in (x, y)]
    return pareto_optimal([(signs[0] * point.x, signs[1] * point.y) for point in points])


def front_rows(points: Sequence[Point], x: str, y: str) -> list[dict[str, Any]]:
    """Rows for a result file: name, metrics, standard errors, and whether it is on the front.

    Raises:
        ConfigError: A metric is not finite.
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
    """Write a PNG of the points with their names and errors, and a line along the front.

    Better is up and to the right: axes of metrics for which lower is better are inverted.

    Args:
        points: Settings.
        x: Name of the first metric.
        y: Name of the second metric.
        path: File to write.

    Raises:
        ConfigError: A metric is not finite.
        StorageError: The file cannot be written.
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
        ConfigError: A metric is not finite.
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
    line = sorted((p.x, p.y) for p, is_best in zip(points, best, strict=True) if is_best)
    axes.plot(*zip(*line, strict=True), color="tab:blue", linewidth=1, zorder=1)
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
    figure.draw_without_rendering()  # sets the scale for the labels
    _place_labels(axes, points, best, line)
    return figure


# Candidate positions of a label around its point: directions, and distances in pixels.
_DIRECTIONS = [(math.cos(k * math.pi / 8), math.sin(k * math.pi / 8)) for k in range(16)]
_DISTANCES = (8, 20, 36, 56, 80, 108, 140)


def _place_labels(
    axes: Any, points: Sequence[Point], best: Sequence[bool], line: Sequence[Any]
) -> None:
    """Put each name at the nearest position that covers least of the other marks.

    `line` is the polyline of the front.
    """
    renderer = axes.figure.canvas.get_renderer()
    occupied = np.concatenate(
        [_mark_boxes(axes, points), _line_boxes(axes.transData.transform(line))]
    )
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
        extent = label.get_window_extent(renderer)
        half = np.array([extent.width, extent.height]) / 2
        offsets = np.array(
            [(d + half) * direction for d in _DISTANCES for direction in _DIRECTIONS]
        )
        centres = axes.transData.transform((point.x, point.y)) + offsets
        boxes = np.concatenate([centres - half, centres + half], axis=1)
        best_index = int(np.argmin(_covered_area(boxes, occupied, axes.bbox.extents)))
        label.set_position(offsets[best_index])
        occupied = np.concatenate([occupied, boxes[best_index : best_index + 1]])


def _mark_boxes(axes: Any, points: Sequence[Point]) -> Array:
    """Boxes (left, bottom, right, top) in pixels of the points and their error bars."""
    boxes = []
    for point in points:
        centre = np.array([point.x, point.y])
        x_error, y_error = point.x_error or 0.0, point.y_error or 0.0
        for reach, pad in (((0, 0), 5), ((x_error, 0), 1), ((0, y_error), 1)):
            ends = axes.transData.transform([centre - reach, centre + reach])
            boxes.append([*(ends.min(0) - pad), *(ends.max(0) + pad)])
    return np.array(boxes)


def _line_boxes(corners: Array) -> Array:
    """Small boxes in pixels along a polyline."""
    parts = [corners[:1]]
    for start, end in pairwise(corners):
        steps = max(2, int(np.linalg.norm(end - start) / 4))
        parts.append(np.linspace(start, end, steps))
    centres = np.concatenate(parts)
    return np.concatenate([centres - 2, centres + 2], axis=1)


def _covered_area(boxes: Array, occupied: Array, axes_box: Array) -> Array:
    """The area of each box, in square pixels, on occupied boxes or outside of the axes."""

    def overlap(others: Array) -> Array:
        low = np.maximum(boxes[:, None, :2], others[None, :, :2])
        high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
        return np.clip(high - low, 0, None).prod(-1).sum(1)

    return (boxes[:, 2:] - boxes[:, :2]).prod(1) - overlap(axes_box[None]) + overlap(occupied)

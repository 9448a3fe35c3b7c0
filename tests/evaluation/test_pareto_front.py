"""The Pareto front and its plot."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image

from customize.errors import ConfigError, StorageError
from customize.evaluation import pareto_front
from customize.evaluation.pareto_front import Point, front_rows, on_front, pareto_optimal

# Few values, so that there are many ties.
PAIRS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5)).map(lambda p: (p[0] / 5, p[1] / 5))
)


def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] >= other[0] and one[1] >= other[1]


@given(PAIRS)
def test_front_equals_the_definition(points: list[tuple[float, float]]) -> None:
    actual = pareto_optimal(points)
    best = [point for point, is_best in zip(points, actual, strict=True) if is_best]
    assert not any(beats(one, other) for one in best for other in best)
    for point, is_best in zip(points, actual, strict=True):
        assert is_best != any(beats(one, point) for one in best)
    # In the order of one rate, the other falls.
    along = sorted(set(best))
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in combinations(along, 2))


@given(PAIRS, st.randoms(use_true_random=False))
def test_front_is_invariant_to_order_and_scale(
    points: list[tuple[float, float]], random: object
) -> None:
    order = list(range(len(points)))
    random.shuffle(order)  # type: ignore[attr-defined]
    actual = pareto_optimal(points)
    assert pareto_optimal([points[k] for k in order]) == [actual[k] for k in order]
    assert pareto_optimal([(3 * x + 1, np.exp(y)) for x, y in points]) == actual
    turned = pareto_optimal([(y, x) for x, y in points])
    assert turned == actual


def test_ties() -> None:
    same = [(0.5, 0.5), (0.5, 0.5)]
    assert pareto_optimal(same) == [True, True]
    assert pareto_optimal([*same, (0.5, 0.6)]) == [False, False, True]
    assert pareto_optimal([(0.2, 0.9), (0.4, 0.9), (0.4, 0.1)]) == [False, True, False]
    assert pareto_optimal([]) == []


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_points_that_are_not_finite_are_refused(wrong: float) -> None:
    with pytest.raises(ConfigError, match="is not finite"):
        pareto_optimal([(0.5, 0.5), (wrong, 1.0)])
    with pytest.raises(ConfigError, match="is not finite"):
        pareto_front.plot([Point("a", 0.5, wrong)], "prompt", "identity")


def test_lower_leak_is_better() -> None:
    points = [Point("low", 0.1, 0.5), Point("high", 0.9, 0.5)]
    assert on_front(points, "leak", "identity") == [True, False]
    assert on_front(points, "prompt", "identity") == [False, True]
    axes = pareto_front.plot(points, "leak", "identity").axes[0]
    assert axes.xaxis.get_inverted() and not axes.yaxis.get_inverted()


def test_rows_have_metrics_by_name() -> None:
    rows = front_rows(
        [Point("a", 0.1, 0.2, None, 0.05), Point("b", 0.0, 0.1)], "prompt", "identity"
    )
    assert rows == [
        {
            "name": "a",
            "prompt": 0.1,
            "identity": 0.2,
            "prompt_error": None,
            "identity_error": 0.05,
            "front": True,
        },
        {
            "name": "b",
            "prompt": 0.0,
            "identity": 0.1,
            "prompt_error": None,
            "identity_error": None,
            "front": False,
        },
    ]


def crowded() -> list[Point]:
    """Twenty settings, six of them at one position, and names as long as benchmarks have them."""
    rng = np.random.default_rng(0)
    around = rng.uniform(0, np.pi / 2, 14)
    far = rng.uniform(0.5, 1, 14)
    positions = [*zip(far * np.cos(around), far * np.sin(around), strict=True), *[(0.5, 0.5)] * 6]
    return [
        Point(f"way {k}, at weight 0.{k}", float(x), float(y), 0.02, 0.03)
        for k, (x, y) in enumerate(positions)
    ]


def test_labels_are_inside_the_axes_and_do_not_overlap() -> None:
    points = crowded()
    figure = pareto_front.plot(points, "prompt", "identity")
    axes = figure.axes[0]
    renderer = figure.canvas.get_renderer()
    # Of the text alone: an annotation's own extent includes the line to its point.
    for label in axes.texts:
        label.update_positions(renderer)
    boxes = [Text.get_window_extent(label, renderer) for label in axes.texts]
    assert [label.get_text() for label in axes.texts] == [point.name for point in points]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    positions = axes.transData.transform([(point.x, point.y) for point in points])
    assert not any(box.contains(*position) for box in boxes for position in positions)
    for box in boxes:
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
        assert axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1


def test_the_line_connects_the_front() -> None:
    points = crowded()
    axes = pareto_front.plot(points, "prompt", "identity").axes[0]
    best = [p for p, is_best in zip(points, on_front(points, "x", "y"), strict=True) if is_best]
    assert 1 < len(best) < len(points)
    (line,) = (line for line in axes.lines if len(line.get_xdata()) == len(best))
    assert list(zip(*line.get_data(), strict=True)) == sorted((p.x, p.y) for p in best)


def test_the_plot_is_written(tmp_path: Path) -> None:
    one = [Point("$1 and \\frac{", 0.5, 0.5)]  # no formula, and no room to spread over
    pareto_front.save_plot(one, "prompt", "identity", tmp_path / "one.png")
    pareto_front.save_plot(crowded(), "prompt", "identity", tmp_path / "many.png")
    with Image.open(tmp_path / "one.png") as one_png, Image.open(tmp_path / "many.png") as many:
        assert one_png.size == many.size == (900, 660)
        assert np.asarray(many.convert("L")).std() > np.asarray(one_png.convert("L")).std()
    with pytest.raises(StorageError):
        pareto_front.save_plot(one, "prompt", "identity", tmp_path / "missing" / "one.png")

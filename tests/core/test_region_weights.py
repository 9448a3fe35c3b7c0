"""Weights of boxes and masks on grids, and answers put together by them."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from customize.core.region_weights import (
    blend,
    box_weights,
    mask_weights,
    region_window,
    stack_regions,
)

# The levels of the UNets of Stable Diffusion 1.5, SDXL and the storybook, and odd ones.
SIZES = [(64, 64), (32, 32), (16, 16), (8, 8), (128, 96), (4, 4), (16, 32), (7, 13), (1, 1)]
sizes = st.sampled_from(SIZES)
edges = st.sampled_from([0.0, 0.05, 0.1, 0.3])


@st.composite
def boxes(draw):
    sides = []
    for _ in range(2):
        low, high = sorted(draw(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=2, unique=True)))
        sides.append((low, high))
    (left, right), (top, bottom) = sides
    return left, top, right, bottom


def area(box, edge):
    """Of the box with its soft edges, by a fine sum over where the line of each rises."""
    x = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000

    def covered(low, high):
        def risen(at):
            return (x >= at).double() if edge == 0 else ((x - at) / edge + 0.5).clamp(0, 1)

        up = risen(low) if low > 0 else torch.ones_like(x)
        down = risen(high) if high < 1 else torch.zeros_like(x)
        return (up - down).clamp(min=0).mean()

    left, top, right, bottom = box
    return float(covered(left, right) * covered(top, bottom))


@given(boxes(), sizes, edges)
def test_the_area_of_a_box_is_the_same_on_every_grid(box, size, edge):
    weights = box_weights(box, *size, edge)
    assert weights.shape == size and weights.dtype == torch.float32
    assert float(weights.min()) >= 0.0 and float(weights.max()) <= 1.0
    assert float(weights.mean()) == pytest.approx(area(box, edge), abs=2e-4)


@given(boxes(), sizes, edges)
def test_cells_far_outside_have_weight_0_and_far_inside_1(box, size, edge):
    weights = box_weights(box, *size, edge)
    left, top, right, bottom = box
    rows, columns = size
    for row in range(rows):
        for column in range(columns):
            x, y = (column + 0.5) / columns, (row + 0.5) / rows
            reach_x, reach_y = edge / 2 + 0.5 / columns, edge / 2 + 0.5 / rows
            if min(x - right, left - x) > 0:
                continue
            outside = x < left - reach_x or x > right + reach_x
            outside |= y < top - reach_y or y > bottom + reach_y
            if outside:
                assert float(weights[row, column]) < 1e-6
            inside = left + reach_x < x < right - reach_x and top + reach_y < y < bottom - reach_y
            if inside:
                assert float(weights[row, column]) > 1 - 1e-6


def test_edges_on_the_border_are_hard_and_others_soft():
    weights = box_weights((0.0, 0.0, 0.5, 1.0), 4, 20, 0.2)
    expected = torch.tensor([1.0] * 8 + [0.875, 0.625, 0.375, 0.125] + [0.0] * 8)
    assert torch.allclose(weights, expected.expand(4, 20), atol=1e-6)


@given(sizes, st.integers(1, 40), st.integers(1, 40))
def test_resized_masks_keep_their_range_and_constants_their_value(size, rows, columns):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows))
    weights = mask_weights(mask, *size)
    assert weights.shape == size
    assert float(mask.min()) - 1e-6 <= float(weights.min())
    assert float(weights.max()) <= float(mask.max()) + 1e-6
    assert torch.allclose(mask_weights(torch.full((rows, columns), 0.3), *size), torch.tensor(0.3))


def test_masks_are_averaged_over_each_cell():
    mask = torch.zeros(8, 8)
    mask[:4, :2] = 1.0
    assert mask_weights(mask, 2, 2).tolist() == [[0.5, 0.0], [0.0, 0.0]]


@given(st.lists(boxes(), min_size=1, max_size=4), sizes, edges)
def test_stacked_regions_add_up_to_one_and_the_last_is_complete(found, size, edge):
    weights = [box_weights(box, *size, edge) for box in found]
    parts = stack_regions(weights)
    assert len(parts) == len(weights) + 1
    assert torch.allclose(sum(parts), torch.ones(size), atol=1e-6)
    assert torch.equal(parts[-1], weights[-1])
    for part, whole in zip(parts[1:], weights, strict=True):
        assert bool((part >= 0).all()) and bool((part <= whole).all())


def test_adjacent_boxes_leave_no_background():
    halves = [box_weights(box, 16, 16) for box in ((0, 0, 0.5, 1), (0.5, 0, 1, 1))]
    background, *parts = stack_regions(halves)
    assert not bool(background.any())  # so that nothing has to be drawn for it
    assert all(torch.allclose(p, h, atol=1e-6) for p, h in zip(parts, halves, strict=True))


def test_predictions_of_weight_1_are_unchanged():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        answers = [torch.randn(3, 4, 4, generator=generator).to(dtype) for _ in range(2)]
        answers[1][0, 0, 0] = torch.nan  # where it has no weight
        weights = stack_regions([box_weights((0.5, 0, 1, 1), 4, 4, 0.0)])
        found = blend(answers, weights)
        assert found.dtype == dtype
        assert torch.equal(found[..., :2], answers[0][..., :2])
        assert torch.equal(found[..., 2:], answers[1][..., 2:])


def test_masks_outside_the_range_are_clamped():
    mask = torch.tensor([[-1.0, 3.0], [0.25, 0.5]])
    assert mask_weights(mask, 2, 2).tolist() == [[0.0, 1.0], [0.25, 0.5]]
    assert mask_weights(mask.half(), 2, 2).dtype == torch.float32


def test_blending_is_in_float32_and_needs_as_many_weights_as_predictions():
    one = torch.full((1, 1), 1.0)
    values = [torch.full((1, 1), v).bfloat16() for v in (1.0, 1e-2)]
    found = blend(values, [one * 0.999, one * 0.001])
    assert found.item() == torch.tensor(0.999 + 1e-5).bfloat16().item()
    assert blend(values[:1], [one]).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="zip"):
        blend(values, [one])


def test_weights_of_large_grids_are_exact_to_float32():
    """By the integral of the trapezoid over each of 4096 cells, in exact fractions."""
    found = box_weights((0.25, 0.0, 0.75, 1.0), 1, 4096, 0.125)[0]

    def integral(x, center):
        distance = max(x - (center - Fraction(1, 16)), Fraction(0))
        is_rising = distance < Fraction(1, 8)
        return distance**2 * 4 if is_rising else distance - Fraction(1, 16)

    bounds = [Fraction(cell, 4096) for cell in range(4097)]
    covered = [integral(x, Fraction(1, 4)) - integral(x, Fraction(3, 4)) for x in bounds]
    expected = [float(4096 * (b - a)) for a, b in pairwise(covered)]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-7, rtol=0)


@given(boxes(), sizes, st.sampled_from([1, 2, 4, 8]))
def test_windows_hold_the_region_and_half_of_the_image(box, size, multiple):
    weights = box_weights(box, *size)
    if not bool(weights.any()):
        return
    outside = weights.clone()
    window = region_window(weights, multiple)
    outside[window] = 0
    assert not bool(outside.any())
    for side, shown, cells in zip(
        window, ((weights > 0).any(1), (weights > 0).any(0)), size, strict=True
    ):
        length = side.stop - side.start
        assert 0 <= side.start < side.stop <= cells
        assert 2 * length >= cells
        assert length == cells or length % multiple == 0
        # The smallest such window.
        extent = int(shown.nonzero()[-1]) + 1 - int(shown.nonzero()[0])
        assert length - multiple < max(extent, -(-cells // 2))


def test_a_window_is_around_its_region():
    weights = torch.zeros(16, 32)
    weights[2:4, 20:24] = 0.5
    assert region_window(weights) == (slice(0, 8), slice(14, 30))
    weights[15, 0] = 1.0
    assert region_window(weights) == (slice(2, 16), slice(0, 24))
    assert region_window(weights, 8) == (slice(0, 16), slice(0, 24))

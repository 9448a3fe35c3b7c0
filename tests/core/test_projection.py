"""Taking a span out of embeddings: what the formula promises, on any numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from customize.core.projection import (
    max_strength,
    overlap_confidence,
    principal_directions,
    project_out,
)
from customize.errors import ConfigError

SIZES = st.tuples(st.integers(1, 6), st.integers(2, 24), st.integers(1, 5), st.integers(0, 999))


def made(sizes):
    """Rows, and what is not wanted."""
    count, width, unwanted, seed = sizes
    noise = torch.Generator().manual_seed(seed)
    return [torch.randn(n, width, generator=noise) for n in (count, unwanted)]


def near(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-4)


@given(SIZES)
def test_strength_0_changes_nothing_and_1_removes_the_subspace(sizes):
    rows, unwanted = made(sizes)
    directions = principal_directions(unwanted)
    assert torch.equal(project_out(rows, directions, 0.0), rows)
    out = project_out(rows, directions, 1.0)
    assert near(out @ unwanted.mT, torch.zeros(len(rows), len(unwanted)))
    assert near(project_out(out, directions, 1.0), out)
    assert near(project_out(unwanted, directions, 1.0), torch.zeros_like(unwanted))


@given(SIZES, st.floats(0, 2))
def test_projection_is_linear_in_strength_and_keeps_orthogonal_rows(sizes, strength):
    rows, unwanted = made(sizes)
    directions = principal_directions(unwanted)
    removed = rows - project_out(rows, directions, 1.0)
    assert near(project_out(rows, directions, strength), rows - strength * removed)
    other = project_out(rows, directions, 1.0)
    assert near(project_out(other, directions, strength), other)
    each = torch.full((len(rows),), strength)
    assert near(project_out(rows, directions, each), project_out(rows, directions, strength))


@given(SIZES, st.randoms())
def test_directions_do_not_depend_on_order_or_repetition_of_rows(sizes, random):
    rows, unwanted = made(sizes)
    order = list(range(len(unwanted)))
    random.shuffle(order)
    again = torch.cat([unwanted[order], 0.5 * unwanted[:1]])
    a, b = principal_directions(unwanted), principal_directions(again)
    assert a.shape == b.shape
    assert near(project_out(rows, a, 1.0), project_out(rows, b, 1.0))


@given(SIZES)
def test_directions_are_orthonormal(sizes):
    directions = principal_directions(made(sizes)[1])
    assert near(directions @ directions.mT, torch.eye(len(directions)))


@given(SIZES, st.floats(0.5, 0.99))
def test_max_strength_keeps_the_minimum_length(sizes, kept):
    rows, unwanted = made(sizes)
    directions = principal_directions(unwanted)
    strength = float(max_strength(rows, directions, kept))
    assert 0.0 <= strength <= 1.0

    def least(strength):
        return float((project_out(rows, directions, strength).norm(dim=1) / rows.norm(dim=1)).min())

    assert least(strength) >= kept - 1e-3
    if strength < 0.99:
        assert least(min(1.0, strength + 0.01)) < kept + 1e-3


def test_max_strength_without_rows_is_one():
    assert float(max_strength(torch.zeros(0, 4), torch.eye(4)[:1], 0.9)) == 1.0


def test_directions_are_sorted_by_singular_value():
    rows = torch.diag(torch.tensor([1.0, 5.0, 3.0]))
    assert principal_directions(rows).abs().tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert len(principal_directions(torch.cat([rows, rows]))) == 3


@pytest.mark.parametrize("strength", [-0.1, 2.1, float("nan"), float("inf")])
def test_strengths_outside_the_range_are_refused(strength):
    with pytest.raises(ConfigError, match="outside the range from 0 to 2"):
        project_out(torch.ones(2, 3), principal_directions(torch.ones(1, 3)), strength)


def test_dtype_and_leading_dimensions_are_preserved():
    rows = torch.randn(2, 3, 4, 8).bfloat16()
    out = project_out(rows, principal_directions(torch.randn(2, 8)), 1.0)
    assert out.shape == rows.shape and out.dtype == torch.bfloat16


@given(SIZES)
def test_batches_equal_single_matrices(sizes):
    rows, unwanted = made(sizes)
    # The second has one direction alone, whatever the first has.
    both = torch.stack([unwanted, unwanted[:1].expand_as(unwanted)])
    directions = principal_directions(both)
    out = project_out(rows.expand(2, *rows.shape), directions, 1.0)
    assert directions.shape[-2] == len(principal_directions(unwanted))
    assert near(out[0], project_out(rows, principal_directions(unwanted), 1.0))
    assert near(out[1], project_out(rows, principal_directions(unwanted[:1]), 1.0))


@given(st.integers(4, 24), st.integers(1, 3), st.integers(0, 999))
def test_confidence_is_low_for_random_rows_and_high_for_rows_inside(width, count, seed):
    noise = torch.Generator().manual_seed(seed)
    directions = principal_directions(torch.randn(count, width, generator=noise))
    rows = torch.randn(4000, width, generator=noise)
    share = (rows @ directions.T).square().sum(-1) / rows.square().sum(-1)
    sure = overlap_confidence(rows, directions)
    # The share's mean and spread among rows of no direction in particular are those that are told.
    assert abs(float(share.mean()) - count / width) < 0.03
    assert torch.all(sure[share <= count / width] == 0)
    told = count / width + 2 * float(share.std()) * sure
    between = (sure > 0) & (sure < 1)
    assert torch.allclose(told[between], share[between], atol=0.03)
    if count / width < 0.5:
        assert near(overlap_confidence(directions, directions), torch.ones(count))
    assert near(overlap_confidence(3.0 * rows, directions), sure)


def test_confidence_is_zero_for_the_whole_space():
    rows = torch.randn(3, 4)
    assert torch.equal(
        overlap_confidence(rows, principal_directions(torch.randn(4, 4))), torch.zeros(3)
    )
    both = torch.stack([torch.eye(4), torch.eye(4)[:1].expand(4, 4)])
    sure = overlap_confidence(torch.eye(4).expand(2, 4, 4), principal_directions(both))
    assert sure.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]


def test_directions_of_centred_rows_are_those_of_the_differences():
    noise = torch.Generator().manual_seed(4)
    rows = torch.randn(5, 12, generator=noise) + 20.0
    mean = rows.mean(0, keepdim=True)
    found = principal_directions(rows, mean)
    assert found.shape == (4, 12)
    assert near(found @ found.T, torch.eye(4))
    assert near(project_out(rows - mean, found, 1.0), torch.zeros_like(rows))
    # A mean for each row is subtracted from its row.
    shifts = torch.randn(5, 12, generator=noise)
    found = principal_directions(rows + shifts, rows)
    assert near(project_out(shifts, found, 1.0), torch.zeros_like(rows)) and len(found) == 5


def test_rounding_errors_of_rows_near_their_mean_are_no_direction():
    """What is left after the mean is compared with the rows' size, not with itself."""
    noise = torch.Generator().manual_seed(4)
    rows = torch.randn(1, 12, generator=noise).expand(3, 12)
    residue = 1e-6 * torch.randn(3, 12, generator=noise)
    assert principal_directions(rows, rows + residue).shape == (0, 12)
    rows = torch.randn(3, 12, generator=noise)
    # The mean's precision counts as well: bfloat16 has errors of 1/256 of the size.
    assert principal_directions(rows, rows.bfloat16()).shape == (0, 12)
    assert principal_directions(rows, rows.bfloat16().float()).shape == (3, 12)
    # The largest singular value is the measure: 8 equal rows of length 1 have sqrt(8).
    rows = torch.eye(12)[:1].expand(8, 12)
    for size, count in ((2.9e-5, 1), (2.7e-5, 0)):
        mean = rows.clone()
        mean[0, 5] += size
        assert principal_directions(rows, mean).shape == (count, 12)
    # Of 8 orthogonal rows of length 1 it is 1.
    rows = torch.eye(12)[:8]
    for size, count in ((1.5e-5, 1), (0.9e-5, 0)):
        mean = rows.clone()
        mean[0, 10] += size
        assert principal_directions(rows, mean).shape == (count, 12)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_directions_do_not_depend_on_the_size_of_rows(size):
    noise = torch.Generator().manual_seed(4)
    rows = torch.randn(2, 12, generator=noise)
    rows = torch.cat([rows, rows.sum(0, keepdim=True)])  # of rank 2 but for rounding
    found = principal_directions(size * rows)
    assert found.shape == (2, 12)
    assert near(project_out(rows, found, 1.0), torch.zeros_like(rows))


def test_rows_of_zeros_have_no_directions():
    assert principal_directions(torch.zeros(3, 5)).shape == (0, 5)
    assert principal_directions(torch.zeros(2, 3, 5)).shape == (2, 0, 5)


def test_ranks_of_a_batch_are_counted_for_each_matrix():
    batch = torch.zeros(3, 4, 6)
    batch[0, 0, 0], batch[1, :2, :2], batch[2] = 1.0, torch.eye(2), 0.0
    found = principal_directions(batch)
    assert found.shape == (3, 2, 6)
    assert found.square().sum((1, 2)).tolist() == pytest.approx([1.0, 2.0, 0.0])


def test_the_strength_two_reverses_a_component():
    directions = torch.eye(4)[:1]
    found = project_out(torch.tensor([[3.0, 1.0, 0.0, 2.0]]), directions, 2.0)
    assert found.tolist() == [[-3.0, 1.0, 0.0, 2.0]]


def test_confidence_and_strength_of_batches_equal_those_of_single_matrices():
    noise = torch.Generator().manual_seed(4)
    rows = torch.randn(2, 3, 5, 9, generator=noise)
    directions = principal_directions(torch.randn(2, 9, generator=noise))
    sure, strength = overlap_confidence(rows, directions), max_strength(rows, directions, 0.95)
    assert sure.shape == (2, 3, 5) and strength.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert near(sure[i, j], overlap_confidence(rows[i, j], directions))
            assert near(strength[i, j], max_strength(rows[i, j], directions, 0.95))
    assert strength.min() < strength.max() - 0.01
    assert max_strength(rows[:, :, :0], directions, 0.9).tolist() == [[1.0] * 3] * 2

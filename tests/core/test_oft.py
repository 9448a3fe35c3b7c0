"""OFT and BOFT by their papers' formulas, dense and in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from customize.core.oft import (
    boft_column_delta,
    cayley_rotations,
    oft_column_delta,
    oft_row_delta,
)
from customize.errors import ConceptError


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm() + 1e-12


@pytest.mark.parametrize("shape", [(12, 5), (12, 2, 3, 3)])
@pytest.mark.parametrize("limit", [None, 0.0, 0.01, 100.0])
def test_oft_turns_blocks_of_rows(shape: tuple[int, ...], limit: float | None) -> None:
    weight, blocks, factors = random(*shape), 0.3 * random(3, 4, 4), 1 + 0.1 * random(12)
    skew = (blocks - blocks.mT).double()
    if limit is not None and skew.norm() > 12 * limit:
        skew = skew * 12 * limit / skew.norm()
    eye = torch.eye(4, dtype=torch.float64)
    turns = [(eye + q) @ torch.linalg.inv(eye - q) for q in skew]
    whole = torch.block_diag(*(turn.T for turn in turns))
    expected = (whole @ weight.double().flatten(1)).reshape(shape)
    found = oft_row_delta(weight, blocks, limit, None)
    assert_near(found.double(), expected - weight.double(), 1e-5)
    sides = [12, *[1] * (len(shape) - 1)]
    expected = factors.double().reshape(sides) * expected - weight.double()
    found = oft_row_delta(weight, blocks, limit, factors.reshape(sides))
    assert_near(found.double(), expected, 1e-5)


def test_boft_is_a_product_of_sparse_rotations() -> None:
    """Each stage as a dense matrix, built index by index."""
    out, side, stages = 16, 4, 3
    weight, blocks = random(out, 5), 0.3 * random(stages, out // side, side, side)
    turns = cayley_rotations(blocks.double(), None)
    expected = weight.double()
    for stage in range(stages):
        stride = 2**stage * side // 2
        order = [
            group * 2 * stride + half * stride + place
            for group in range(out // (2 * stride))
            for place in range(stride)
            for half in range(2)
        ]
        together = torch.eye(out, dtype=torch.float64)[order]
        expected = together.T @ torch.block_diag(*turns[stage]) @ together @ expected
    assert_near(
        oft_row_delta(weight, blocks, None, None).double(), expected - weight.double(), 1e-5
    )


@settings(deadline=None)
@given(st.integers(1, 8), st.floats(0.01, 3.0))
def test_rotations_are_orthogonal(side: int, size: float) -> None:
    (turn,) = cayley_rotations(size * random(1, side, side).double(), None)
    assert (turn @ turn.T - torch.eye(side)).abs().max() <= 1e-9


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 3, 4, 4), (5, 5)])
def test_blocks_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConceptError, match="do not rotate"):
        oft_row_delta(random(10, 4), random(*shape), None, None)
    with pytest.raises(ConceptError, match="do not rescale"):
        oft_row_delta(random(12, 4), random(3, 4, 4), None, torch.ones(5))


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.booleans())
def test_columns_keep_their_lengths(
    blocks: int, side: int, out: int, shared: bool, swapped: bool
) -> None:
    """An exact rotation of columns changes no row's length."""
    weight = random(out, blocks * side)
    entries = random(1 if shared else blocks, side * (side - 1) // 2)
    if side == 1:
        entries = entries[:, :0]
    done = weight + oft_column_delta(weight, entries, terms=None, swapped=swapped)
    torch.testing.assert_close(done.norm(dim=1), weight.norm(dim=1), rtol=1e-4, atol=1e-5)
    # The series goes the other way round: peft's sign of the generator differs between the two.
    small = 0.01 * entries
    exact = oft_column_delta(weight, -small, terms=None, swapped=swapped)
    assert_near(oft_column_delta(weight, small, terms=9, swapped=swapped), exact, 1e-4)


@pytest.mark.parametrize(
    ("weight", "entries"), [((4, 6), (2, 2)), ((4, 6), (2, 6)), ((4, 7), (2, 3)), ((4, 6), (3, 3))]
)
def test_entries_that_do_not_fit(weight: tuple[int, ...], entries: tuple[int, ...]) -> None:
    with pytest.raises(ConceptError):
        oft_column_delta(random(*weight), random(*entries), terms=5)


@pytest.mark.parametrize(
    ("blocks", "scales"),
    [((1, 2, 4, 4), 3), ((1, 3, 4, 4), 4), ((2, 4), 4), ((2, 2, 4, 3), 4), ((3, 2, 4, 4), 4)],
)
def test_stages_that_do_not_fit(blocks: tuple[int, ...], scales: int) -> None:
    with pytest.raises(ConceptError):
        boft_column_delta(random(4, 8), random(*blocks), torch.ones(scales, 1))

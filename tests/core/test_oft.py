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
    row_rotation_delta,
    validate_rotations,
)
from customize.errors import ConceptError


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm() + 1e-12


@pytest.mark.parametrize("shape", [(12, 5), (12, 2, 3, 3)])
@pytest.mark.parametrize("limit", [None, 0.0, 0.01, 100.0])
def test_oft_rotates_blocks_of_rows(shape: tuple[int, ...], limit: float | None) -> None:
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
def test_blocks_of_mismatched_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConceptError, match="do not rotate"):
        oft_row_delta(random(10, 4), random(*shape), None, None)
    with pytest.raises(ConceptError, match="do not rescale"):
        oft_row_delta(random(12, 4), random(3, 4, 4), None, torch.ones(5))


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.booleans())
def test_rotations_of_columns_preserve_row_norms(
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
def test_entries_of_mismatched_shapes_are_refused(
    weight: tuple[int, ...], entries: tuple[int, ...]
) -> None:
    with pytest.raises(ConceptError):
        oft_column_delta(random(*weight), random(*entries), terms=5)


@pytest.mark.parametrize(
    ("blocks", "scales"),
    [((1, 2, 4, 4), 3), ((1, 3, 4, 4), 4), ((2, 4), 4), ((2, 2, 4, 3), 4), ((3, 2, 4, 4), 4)],
)
def test_stages_of_mismatched_shapes_are_refused(blocks: tuple[int, ...], scales: int) -> None:
    with pytest.raises(ConceptError):
        boft_column_delta(random(4, 8), random(*blocks), torch.ones(scales, 1))


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 7])
def test_the_neumann_series_has_the_given_number_of_terms(terms: int) -> None:
    """``I + 2 Q + ... + 2 Q^(terms - 2) + Q^(terms - 1)`` as in peft, power by power."""
    weight, entries = random(3, 6), 0.2 * random(2, 3)
    delta = oft_column_delta(weight, entries, terms=terms)
    blocks = []
    for a, b, c in entries.double().tolist():
        skew = torch.tensor([[0, a, b], [-a, 0, c], [-b, -c, 0]], dtype=torch.float64)
        series = torch.eye(3, dtype=torch.float64)
        for power in range(1, terms):
            is_last = (power == terms - 1 and power >= 3) or (terms == 3 and power == 3)
            series = series + (1 if is_last else 2) * torch.matrix_power(skew, power)
        if terms == 3:  # peft adds the last power once more beyond the second
            series = series + torch.matrix_power(skew, 3)
        blocks.append(series)
    expected = weight.double() @ torch.block_diag(*blocks).T - weight.double()
    assert_near(delta.double(), expected, 1e-5)


def test_coft_limits_the_norm_of_each_generator() -> None:
    weight, entries = random(3, 6), random(2, 3)
    entries[1] *= 1e-3  # below the limit
    limit = 0.05
    scaled = entries.double().clone()
    scaled[0] *= limit / 2**0.5 / (2**0.5 * scaled[0].norm())
    expected = oft_column_delta(weight, scaled.float(), terms=None)
    assert_near(oft_column_delta(weight, entries, terms=None, limit=limit), expected, 1e-4)
    zeros = torch.zeros(2, 3)
    assert oft_column_delta(weight, zeros, terms=None, limit=limit).abs().max() == 0.0


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("kernel", [(), (2,)])
def test_boft_of_columns_is_a_product_of_sparse_rotations(
    stages: int, kernel: tuple[int, ...]
) -> None:
    """Each stage as a dense matrix with peft's order of columns: even half blocks before odd."""
    side, width, out = 4, 16, 3
    weight = random(out, width // (kernel[0] if kernel else 1), *kernel)
    blocks = 0.3 * random(stages, width // side, side, side)
    scales = 1 + 0.1 * random(out, 1)
    eye = torch.eye(side, dtype=torch.float64)
    expected = weight.double().flatten(1).T
    for stage, generators in enumerate(blocks.double()):
        skews = 0.5 * (generators - generators.mT)
        turns = [(eye - q) @ torch.linalg.inv(eye + q) for q in skews]
        segment, half = 2**stage * side, side // 2
        order: list[int] = []
        for start in range(0, width, segment):
            chunks = [list(range(k, k + half)) for k in range(start, start + segment, half)]
            order += [k for chunk in chunks[0::2] + chunks[1::2] for k in chunk]
        if stages == 1:
            order = list(range(width))
        permuted = torch.empty_like(expected)
        permuted[order] = expected  # row order[k] of the permuted columns is row k
        expected = (torch.block_diag(*turns) @ permuted)[order]
    expected = (scales.double() * expected.T).reshape(weight.shape) - weight.double()
    assert_near(boft_column_delta(weight, blocks, scales).double(), expected, 1e-5)
    assert_near(boft_column_delta(weight, blocks, scales.T).double(), expected, 1e-5)


def test_stored_rotations_are_validated() -> None:
    turns = cayley_rotations(random(3, 4, 4), None)
    assert torch.equal(validate_rotations(turns), turns)
    half = validate_rotations(turns.half())
    assert half.dtype == torch.float32 and torch.equal(half, turns.half().float())
    assert torch.equal(validate_rotations(turns[None]), turns[None])
    for wrong in (turns[0], turns[:, :2], turns[None, None], 1.05 * turns, turns + 0.1):
        with pytest.raises(ConceptError, match="not rotations"):
            validate_rotations(wrong)
    # Errors of rounding are accepted.
    assert validate_rotations(1.02 * turns).shape == (3, 4, 4)


@pytest.mark.parametrize("shape", [(5, 2, 2, 2), (2, 4, 3, 3), (1, 2, 6)])
def test_blocks_of_row_rotations_that_do_not_match_the_weight(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConceptError):
        row_rotation_delta(random(12, 4), random(*shape), None)


def test_stages_that_pair_rows_too_far_apart() -> None:
    with pytest.raises(ConceptError, match="does not fit 12 rows"):
        row_rotation_delta(random(12, 4), random(3, 3, 4, 4), None)


def test_odd_blocks_are_rotated_in_one_stage_only() -> None:
    turns = cayley_rotations(random(2, 3, 3), None)
    assert row_rotation_delta(random(6, 4), turns, None).shape == (6, 4)
    with pytest.raises(ConceptError, match="cannot be halved"):
        row_rotation_delta(random(6, 4), turns[None], None)
    weight, blocks = random(3, 6), random(1, 2, 3, 3)
    assert boft_column_delta(weight, blocks, torch.ones(3, 1)).shape == (3, 6)
    with pytest.raises(ConceptError, match="do not fit 6 columns"):
        boft_column_delta(weight, blocks.expand(2, 2, 3, 3), torch.ones(3, 1))
    # Four stages of blocks of two need segments of 16 columns.
    with pytest.raises(ConceptError, match="do not fit 24 columns"):
        boft_column_delta(random(3, 24), random(4, 12, 2, 2), torch.ones(3, 1))


def test_rotations_keep_their_dtype() -> None:
    for dtype in (torch.float32, torch.float64):
        assert cayley_rotations(random(2, 3, 3).to(dtype), 0.5).dtype == dtype


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_generators_of_rotations_are_square(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConceptError, match="are not square"):
        cayley_rotations(random(*shape), None)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("side", "count"), [(4, 3), (32, 2)])
def test_columns_are_rotated_by_peft_or_by_its_transpose(
    side: int, count: int, swapped: bool
) -> None:
    """Each row times the dense matrix ``R^T``, or R for files of OneTrainer and sd-scripts."""
    weight, entries = random(3, side * count), 0.1 * random(count, side * (side - 1) // 2)
    eye = torch.eye(side, dtype=torch.float64)
    turns = []
    for row in entries.double():
        upper = torch.zeros(side, side, dtype=torch.float64)
        upper[torch.triu(torch.ones(side, side), 1).bool()] = row
        skew = upper - upper.T
        turns.append((eye - skew) @ torch.linalg.inv(eye + skew))
    whole = torch.block_diag(*turns)
    expected = weight.double() @ (whole if swapped else whole.T) - weight.double()
    found = oft_column_delta(weight, entries, terms=None, swapped=swapped)
    assert_near(found.double(), expected, 1e-5)


def test_entries_of_one_dimension_are_refused() -> None:
    with pytest.raises(ConceptError, match="are not of square blocks"):
        oft_column_delta(random(4, 6), random(3), terms=5)
    with pytest.raises(ConceptError, match="are not of square blocks"):
        oft_column_delta(random(4, 6), random(2, 1, 3), terms=5)


def test_one_stage_rotates_blocks_of_adjacent_columns() -> None:
    """Blocks of odd width cannot be halved, so the columns of a single stage are not reordered."""
    weight, blocks = random(3, 6), 0.3 * random(1, 2, 3, 3)
    eye, skews = torch.eye(3, dtype=torch.float64), 0.5 * (blocks - blocks.mT)[0].double()
    whole = torch.block_diag(*((eye - q) @ torch.linalg.inv(eye + q) for q in skews))
    expected = weight.double() @ whole.T - weight.double()
    found = boft_column_delta(weight, blocks, torch.ones(3, 1))
    assert_near(found.double(), expected, 1e-5)

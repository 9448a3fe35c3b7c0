"""Sums, truncations and norms of low-rank products agree with dense float64 arithmetic."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from customize.core.bases import block, cosine, down_projection
from customize.core.lowrank import (
    LowRank,
    add_weighted_sum,
    all_finite,
    check_same_weight,
    distance,
    from_dense,
    from_factors,
    inner_product,
    norm,
    pad_rank,
    row_factor,
    slice_rows,
    stack_rows,
    to_dense,
    to_float64,
    weighted_sum,
)
from customize.errors import ConceptError
from tests.core.making import close, dense, updates


@settings(deadline=None)
@given(updates(count=1))
def test_to_dense_matches_float64_products(case):
    (p,), _ = case
    assert close(to_dense(p), dense(p))
    assert to_dense(p).shape == p.shape
    assert to_dense(p).dtype in (torch.float32, torch.float64)


@settings(deadline=None)
@given(updates())
def test_weighted_sum_is_the_sum_of_products(case):
    products, weights = case
    merged = weighted_sum(products, weights)
    expected = sum(w * dense(p) for p, w in zip(products, weights, strict=True))
    size = sum(abs(w) * dense(p).abs().max() for p, w in zip(products, weights, strict=True))
    assert (dense(merged) - expected).abs().max() <= 1e-5 * (1 + size)
    assert merged.scale == 1.0
    wide = any(p.up.dtype == torch.float64 for p in products)
    assert merged.up.dtype == merged.down.dtype == (torch.float64 if wide else torch.float32)


def test_ranks_add_unless_downs_are_equal():
    torch.manual_seed(0)
    down = torch.randn(3, 20)
    ups = [torch.randn(15, 3) for _ in range(4)]
    shared = [LowRank(up, down.clone(), scale) for up, scale in zip(ups, (1, 2, 3, 4), strict=True)]
    merged = weighted_sum(shared, [0.6] * 4)
    assert merged.rank == 3
    assert torch.equal(merged.down, down)
    assert close(dense(merged), 0.6 * sum(dense(p) for p in shared))
    nearly = LowRank(ups[0], torch.nextafter(down, torch.tensor(9.0)))
    other = LowRank(ups[0], torch.randn(3, 20))
    assert weighted_sum([*shared, nearly], [0.6] * 5).rank == 6
    # In any order, and with the same first numbers.
    mixed = [shared[0], other, shared[1], nearly, shared[2]]
    assert weighted_sum(mixed, [1.0] * 5).rank == 9
    assert close(dense(weighted_sum(mixed, [1.0] * 5)), sum(dense(p) for p in mixed))
    # Equal values in another precision are the same slice.
    half = LowRank(ups[0], down.bfloat16()), LowRank(ups[1], down.bfloat16().float())
    assert weighted_sum(half, [1.0, 1.0]).rank == 3


def test_the_rank_of_a_sum_does_not_exceed_the_weights_sides():
    torch.manual_seed(0)
    for out, width in ((5, 8), (8, 5)):
        products = [LowRank(torch.randn(out, 2), torch.randn(2, width), 0.5) for _ in range(4)]
        merged = weighted_sum(products, [1.0, 2.0, -1.0, 0.5])
        expected = dense(products[0]) + 2 * dense(products[1]) - dense(products[2])
        assert close(dense(merged), expected + 0.5 * dense(products[3]))
        assert merged.rank == 5
        assert torch.equal(to_dense(merged), merged.down if out < width else merged.up)


@settings(deadline=None)
@given(updates(), st.booleans())
def test_add_weighted_sum_matches_dense_sums(case, whole):
    products, weights = case
    if whole:  # one that is dense but for its form
        products[0] = from_dense(to_dense(products[0]))
    start = torch.randn(products[0].shape, dtype=torch.float64)
    total = start.float()
    add_weighted_sum(total, products, weights)
    parts = [w * dense(p) for p, w in zip(products, weights, strict=True)]
    size = sum(part.abs().max() for part in parts) + start.abs().max()
    assert (total - (start + sum(parts))).abs().max() <= 1e-5 * (1 + size)
    before = total.clone()
    add_weighted_sum(total, [], [])
    assert torch.equal(total, before)


def test_many_products_are_added_in_batches():
    torch.manual_seed(0)
    slices = [torch.randn(20, 400) for _ in range(20)]
    products = [LowRank(torch.randn(30, 20), slices[k % 20].clone(), 0.1) for k in range(60)]
    total = torch.zeros(30, 400)
    add_weighted_sum(total, products, [1.0] * 60)
    assert close(total, sum(dense(p) for p in products))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_all_finite_detects_nan_and_infinity(bad, dtype):
    values = torch.full((50, 50), torch.finfo(dtype).max, dtype=dtype)  # whose sum is not finite
    if bad is not None:
        values[3, 4] = bad
    assert all_finite(values) == (bad is None)
    opposite = torch.tensor([math.inf, -math.inf], dtype=dtype)
    assert not all_finite(opposite) and all_finite(torch.zeros(0, dtype=dtype))


def test_sums_of_half_precision_are_computed_in_float32():
    down = torch.eye(2, dtype=torch.float16)
    large = LowRank(torch.tensor([[1024.0, 0.0]], dtype=torch.float16), down)
    small = LowRank(torch.tensor([[0.25, 0.0]], dtype=torch.float16), down)
    assert to_dense(weighted_sum([large, small], [1.0, 1.0]))[0, 0] == 1024.25


@pytest.mark.parametrize("rank", [1, 4])
def test_sums_of_disjoint_slices_do_not_mix(rank):
    torch.manual_seed(0)
    width = 48
    products = [
        LowRank(
            torch.randn(32, rank),
            down_projection(cosine, width, block(i, width, rank), 0, scale=0.5),
            2.0,
        )
        for i in range(3)
    ]
    for i, p in enumerate(products):
        for q in products[i + 1 :]:
            assert (dense(p) @ dense(q).T).abs().max() < 1e-5
            assert abs(inner_product(p, q)) < 1e-5 * norm(p) * norm(q)
    merged = dense(weighted_sum(products, [1.0] * 3))
    assert close(merged, sum(dense(p) for p in products))
    # On an input from its own slice each concept acts in the merged model as it does alone.
    own = products[0].down.double().T
    assert close(merged @ own, dense(products[0]) @ own)


@settings(deadline=None)
@given(updates(count=2, dtype=torch.float32))
def test_inner_norm_and_distance(case):
    (p, q), _ = case
    size = 1e-10 * (1 + norm(p)) * (1 + norm(q))
    assert abs(inner_product(p, q) - (dense(p) * dense(q)).sum().item()) < size
    assert abs(norm(p) - torch.linalg.matrix_norm(dense(p)).item()) < size
    assert abs(distance(p, q) - torch.linalg.matrix_norm(dense(p) - dense(q)).item()) < size
    assert abs(inner_product(p, p) - norm(p) ** 2) < size * (1 + norm(p))
    assert close(row_factor(p).T @ row_factor(p), dense(p).T @ dense(p), 1e-10)


def test_distance_is_zero_for_equal_products_of_different_factors():
    torch.manual_seed(0)
    p = LowRank(torch.randn(30, 4), torch.randn(4, 20), 0.5)
    turn = torch.tensor([[0.0, 2.0, 0, 0], [4.0, 0, 0, 0], [0, 0, 0.5, 0], [0, 0, 0, 1.0]])
    q = LowRank(p.up @ turn, torch.linalg.inv(turn) @ p.down, 0.5)
    assert distance(p, q) < 1e-12 * norm(p)
    assert distance(p, p) == 0.0


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([(1, 1), (3, 3), (1, 3)]),
)
def test_convolution_factors(out, channels, rank, kernel):
    down = torch.randn(rank, channels, *kernel, dtype=torch.float64)
    up = torch.randn(out, rank, 1, 1, dtype=torch.float64)
    x = torch.randn(2, channels, 5, 5, dtype=torch.float64)
    p = from_factors(up, down, 0.5)
    whole = torch.nn.functional.conv2d(x, to_dense(p).reshape(out, channels, *kernel))
    chained = 0.5 * torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down), up)
    assert torch.allclose(whole, chained)


def test_linear_factors_are_unchanged():
    up, down = torch.randn(3, 2), torch.randn(2, 4)
    p = from_factors(up, down, 2.0)
    assert torch.equal(p.up, up)
    assert torch.equal(p.down, down)
    assert (p.rank, p.shape, p.scale) == (2, (3, 4), 2.0)


@pytest.mark.parametrize(
    ("up", "down"),
    [((3, 2), (3, 4)), ((3,), (3, 4)), ((3, 2), (2, 4, 1)), ((3, 2, 1, 1), (2, 4, 1, 1))],
)
def test_factors_of_mismatched_shapes_are_refused(up, down):
    with pytest.raises(ConceptError, match="have no product"):
        LowRank(torch.zeros(up), torch.zeros(down))


def test_infinite_scales_and_wide_kernels_are_refused():
    with pytest.raises(ConceptError, match="nan"):
        LowRank(torch.zeros(3, 2), torch.zeros(2, 4), math.nan)
    with pytest.raises(ConceptError, match="1 x 1"):
        from_factors(torch.zeros(3, 2, 3, 3), torch.zeros(2, 4, 1, 1))


def test_mismatched_arguments_are_refused():
    p, q = LowRank(torch.ones(3, 2), torch.ones(2, 4)), LowRank(torch.ones(3, 2), torch.ones(2, 5))
    for refuse in (lambda: inner_product(p, q), lambda: distance(p, q)):
        with pytest.raises(ConceptError, match="do not belong to one weight"):
            refuse()


def test_padding_keeps_the_product_and_applies_the_scale():
    torch.manual_seed(0)
    p = LowRank(torch.randn(5, 2), torch.randn(2, 7), 0.5)
    padded = pad_rank(p, 4)
    assert padded.rank == 4 and padded.scale == 1.0
    assert torch.equal(padded.up, torch.cat([0.5 * p.up, torch.zeros(5, 2)], 1))
    assert torch.equal(padded.down, torch.cat([p.down, torch.zeros(2, 7)]))
    assert padded.up.is_contiguous() and padded.down.is_contiguous()


def test_rows_are_sliced_with_their_scale():
    torch.manual_seed(0)
    p = LowRank(torch.randn(5, 2), torch.randn(2, 7), 0.5)
    part = slice_rows(p, 1, 3)
    assert part.shape == (2, 7) and part.scale == 0.5
    assert torch.equal(to_dense(part), to_dense(p)[1:3])


def test_stacked_rows_keep_the_highest_precision():
    torch.manual_seed(0)
    down = torch.randn(2, 7)
    wide = LowRank(torch.randn(3, 2).double(), down.double(), 0.5)
    other = LowRank(torch.randn(4, 2), down, 2.0)
    stacked = stack_rows([other, wide])
    assert stacked.rank == 2 and stacked.up.dtype == stacked.down.dtype == torch.float64
    assert close(to_dense(stacked), torch.cat([dense(other), dense(wide)]), 1e-12)
    single = stack_rows([wide])
    assert torch.equal(single.down, wide.down) and single.scale == 1.0
    half = stack_rows([LowRank(other.up.half(), down.half()), LowRank(other.up, down + 1)])
    assert half.rank == 4 and half.up.dtype == half.down.dtype == torch.float32


def test_convolution_factors_have_kernels_of_one_pixel():
    with pytest.raises(ConceptError, match="not a 1 x 1 convolution"):
        from_factors(torch.ones(4, 2, 3), torch.ones(2, 5))
    p = from_factors(torch.ones(4, 2, 1), torch.ones(2, 5, 3))
    assert p.shape == (4, 15) and p.scale == 1.0


def test_the_repr_contains_shape_rank_scale_and_dtype():
    p = LowRank(torch.ones(4, 2), torch.ones(2, 5), 0.25)
    assert repr(p) == "LowRank(4x5, rank 2, scale 0.25, torch.float32)"


def half_precision(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_scales_are_multiplied_in_float32():
    """One third of a bfloat16 number is not a bfloat16 number."""
    p = LowRank(half_precision(5, 2, seed=0), half_precision(2, 7, seed=1), 1 / 3)
    whole = from_dense(half_precision(5, 7, seed=2))
    whole = LowRank(whole.up, whole.down, 1 / 3)
    same_up = LowRank(p.up, half_precision(2, 7, seed=3), 1 / 3)
    for update in (to_dense(whole), *stack_rows([p, same_up]).__dict__.values()):
        assert not isinstance(update, torch.Tensor) or update.dtype == torch.float32
    assert close(to_dense(whole), dense(whole), 1e-7)
    assert close(to_dense(stack_rows([p, same_up])), torch.cat([dense(p), dense(same_up)]), 1e-6)
    merged = weighted_sum([p, same_up], [1.0, 0.7])
    assert merged.up.dtype == merged.down.dtype == torch.float32
    assert close(dense(merged), dense(p) + 0.7 * dense(same_up), 1e-6)


@pytest.mark.parametrize("count", [2, 3])
def test_downs_of_products_with_one_up_are_added(count):
    torch.manual_seed(0)
    up = torch.randn(9, 2)
    products = [LowRank(up.clone(), torch.randn(2, 8), 0.5 * k + 1) for k in range(count)]
    weights = [1.0, -2.0, 0.3][:count]
    merged = weighted_sum(products, weights)
    assert merged.rank == 2 and torch.equal(merged.up, up)
    assert close(dense(merged), sum(w * dense(p) for p, w in zip(products, weights, strict=True)))


@pytest.mark.parametrize("shape", [(3, 3), (3, 5), (5, 3)])
def test_only_an_identity_is_taken_for_one(shape):
    """A factor of ones on its diagonal, or of one other number, multiplies like any other."""
    torch.manual_seed(0)
    side = min(shape)
    for square in (
        torch.eye(side),
        2 * torch.eye(side),
        torch.eye(side).flip(0),
        torch.ones(side, side).triu(),
    ):
        whole = torch.randn(shape)
        left = LowRank(square, whole, 0.5) if shape[0] == side else None
        right = LowRank(whole, square, 0.5) if shape[1] == side else None
        for p in filter(None, (left, right)):
            assert close(to_dense(p), dense(p))
            total = torch.zeros(shape)
            add_weighted_sum(total, [p], [-1.5])
            assert close(total, -1.5 * dense(p))


def test_sums_are_added_to_totals_of_inference_mode():
    torch.manual_seed(0)
    p = LowRank(torch.randn(4, 2), torch.randn(2, 5), 0.5)
    with torch.inference_mode():
        total = torch.ones(4, 5)
    add_weighted_sum(total, [p, from_dense(to_dense(p))], [1.0, 2.0])
    assert close(total, 1 + 3 * dense(p))


def test_every_product_of_a_sum_has_a_weight():
    p = LowRank(torch.ones(3, 2), torch.ones(2, 4))
    for weights in ([1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match="zip"):
            add_weighted_sum(torch.zeros(3, 4), [p, p], weights)


@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (4, 4)])
@pytest.mark.parametrize("rank", [2, 3, 5, 8])
def test_row_factors_are_as_thin_as_the_product(shape, rank):
    torch.manual_seed(0)
    p = LowRank(torch.randn(shape[0], rank), torch.randn(rank, shape[1]), -0.5)
    factor = row_factor(p)
    assert factor.shape == (min(shape[0], rank), shape[1])
    assert close(factor.T @ factor, dense(p).T @ dense(p), 1e-12)


def test_slices_of_several_precisions_are_one_in_any_order():
    down = half_precision(2, 7, seed=0)
    ups = [half_precision(9, 2, seed=seed).float() for seed in (1, 2, 3)]
    for downs in ((down, down.float(), down.double()), (down.double(), down.float(), down)):
        products = [LowRank(up, d) for up, d in zip(ups, downs, strict=True)]
        merged = weighted_sum(products, [1.0] * 3)
        assert merged.rank == 2
        assert close(dense(merged), sum(dense(p) for p in products))


def test_updates_stay_on_their_device():
    """The device ``meta`` stands for any other than the CPU: it has shapes, but no numbers."""
    there = torch.empty(3, 4, device="meta")
    assert to_float64(there).device.type == "meta" and to_float64(there).dtype == torch.float64
    p = from_dense(there)
    assert p.up.device.type == p.down.device.type == "meta"
    here = LowRank(torch.ones(3, 3), torch.ones(3, 4))
    for products in ([here, p], [p, here], [here, here, p]):
        with pytest.raises(ConceptError, match="do not belong to one weight"):
            check_same_weight(products)
    check_same_weight([p, p])

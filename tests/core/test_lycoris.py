"""LoHa, LoKr, Tucker cores and DoRA by their papers' formulas, dense and in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from customize.core.lowrank import (
    LowRank,
    from_dense,
    slice_rows,
    stack_rows,
    to_dense,
    weighted_sum,
)
from customize.core.lycoris import (
    dora_delta,
    hadamard_product,
    initial_adapter,
    kronecker_product,
    tucker_product,
)
from customize.errors import ConceptError

sizes = st.integers(1, 6)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def exact(p: LowRank) -> Tensor:
    return p.scale * (p.up.double() @ p.down.double())


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm() + 1e-12


@settings(deadline=None)
@given(sizes, sizes, sizes, sizes, st.integers(0, 99))
def test_hadamard_products_are_exact(out: int, width: int, r: int, s: int, seed: int) -> None:
    p = LowRank(random(out, r, seed=seed), random(r, width, seed=seed), 0.5)
    q = LowRank(random(out, s, seed=seed + 1), random(s, width, seed=seed + 1), 3.0)
    both = hadamard_product(p, q)
    assert both.rank == min(r * s, out, width)
    assert_near(exact(both), exact(p) * exact(q), 1e-5)


@settings(deadline=None)
@given(sizes, sizes, sizes, sizes, sizes, sizes, st.integers(0, 99))
def test_kronecker_products_are_exact(
    a: int, b: int, r: int, c: int, d: int, s: int, seed: int
) -> None:
    p = LowRank(random(a, r, seed=seed), random(r, b, seed=seed), 2.0)
    q = LowRank(random(c, s, seed=seed + 1), random(s, d, seed=seed + 1), 0.25)
    both = kronecker_product(p, q)
    assert both.rank == min(r * s, a * c, b * d)
    assert_near(exact(both), torch.kron(exact(p), exact(q)), 1e-5)


@settings(deadline=None)
@given(sizes, sizes, st.integers(0, 99))
def test_dense_updates_are_represented_exactly(out: int, width: int, seed: int) -> None:
    whole = random(out, width, seed=seed)
    made = from_dense(whole)
    assert made.rank == min(out, width)
    assert torch.equal(to_dense(made), whole)


def test_sums_of_dense_updates_keep_their_rank() -> None:
    for shape in ((5, 3), (3, 5)):
        p, q = from_dense(random(*shape)), from_dense(random(*shape, seed=7))
        both = weighted_sum([p, q], [0.5, 2.0])
        assert both.rank == 3
        assert_near(exact(both), 0.5 * exact(p) + 2.0 * exact(q))


def test_stacked_rows_are_exact() -> None:
    parts = [LowRank(random(n, 2, seed=n), random(2, 4, seed=n), 0.5 * n) for n in (2, 3)]
    whole = stack_rows(parts)
    assert_near(exact(whole), torch.cat([exact(part) for part in parts]))
    assert_near(exact(slice_rows(whole, 2, 5)), exact(parts[1]))
    shared = [LowRank(part.up, parts[0].down, part.scale) for part in parts]
    assert stack_rows(shared).rank == 2 and whole.rank == 4
    with pytest.raises(ConceptError, match="different input widths"):
        stack_rows([parts[0], LowRank(random(2, 1), random(1, 3))])


def test_tucker_products_are_exact() -> None:
    up, core, down = random(5, 3, 1, 1), random(3, 2, 3, 3), random(2, 4, 1, 1)
    made = tucker_product(up, down, core)
    expected = torch.einsum(
        "or,rshw,si->oihw", up[:, :, 0, 0].double(), core.double(), down[:, :, 0, 0].double()
    )
    assert made.rank == 3
    assert_near(exact(made), expected.flatten(1))
    with pytest.raises(ConceptError, match="have no product"):
        tucker_product(up, random(3, 4, 1, 1), core)
    with pytest.raises(ConceptError, match="wider than one pixel"):
        tucker_product(random(5, 3, 3, 3), down, None)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3), (4, 4), (4, 4, 3, 3)])
@pytest.mark.parametrize("of_rows", [True, False])
def test_dora(shape: tuple[int, ...], of_rows: bool) -> None:
    weight = random(*shape)
    update = LowRank(random(shape[0], 2), random(2, weight[0].numel()), 0.5)
    ones = [1] * (len(shape) - 2)
    magnitude = 1 + random(*((shape[0], 1) if of_rows else (1, shape[1])), *ones).abs()
    changed = weight.double() + exact(update).reshape(shape)
    dims = [dim for dim in range(len(shape)) if dim != (0 if of_rows else 1)]
    lengths = changed.square().sum(dims, keepdim=True).sqrt()
    expected = magnitude.double() * changed / lengths - weight.double()
    assert_near(dora_delta(weight, update, magnitude).double(), expected)
    if of_rows:
        assert torch.equal(
            dora_delta(weight, update, magnitude.flatten()), dora_delta(weight, update, magnitude)
        )


def test_dora_is_zero_for_the_weights_own_magnitudes() -> None:
    weight = random(6, 4)
    still = dora_delta(weight, LowRank(torch.zeros(6, 1), random(1, 4)), weight.norm(dim=1))
    assert still.abs().max() <= 1e-6


@pytest.mark.parametrize("shape", [(5,), (5, 1), (1, 5), (1, 1), (6, 4), (6, 1, 1, 1)])
def test_magnitudes_of_mismatched_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConceptError, match="do not fit"):
        dora_delta(random(6, 4), LowRank(random(6, 1), random(1, 4)), torch.ones(shape))


def test_factors_without_core_are_flattened():
    up, down = random(5, 3, 1, 1), random(3, 4, 2, 2)
    made = tucker_product(up, down, None)
    assert torch.equal(made.up, up[:, :, 0, 0])
    assert torch.equal(made.down, down.reshape(3, 16))
    assert made.scale == 1.0
    with pytest.raises(ConceptError, match="wider than one pixel"):
        tucker_product(random(5, 3, 2, 1), down, None)


def test_cores_of_one_dimensional_convolutions():
    up, down, core = random(5, 3), random(2, 4), random(3, 2, 7)
    made = tucker_product(up, down, core)
    expected = torch.einsum("or,rsk,si->oik", up.double(), core.double(), down.double())
    assert_near(exact(made), expected.flatten(1))
    for wrong in (random(3, 2), random(3, 3, 7)):
        with pytest.raises(ConceptError, match="have no product"):
            tucker_product(up, down, wrong)


def test_products_stay_low_rank_below_the_smaller_side():
    p, q = LowRank(random(7, 2), random(2, 9)), LowRank(random(7, 3), random(3, 9))
    assert hadamard_product(p, q).rank == 6
    square = LowRank(random(6, 2), random(2, 9)), LowRank(random(6, 3), random(3, 9))
    dense = hadamard_product(*square)  # of rank 6, which is the smaller side
    assert torch.equal(dense.up, torch.eye(6))


def test_kronecker_products_are_dense_at_full_rank():
    p, q = LowRank(random(2, 2), random(2, 3)), LowRank(random(3, 3), random(3, 4))
    dense = kronecker_product(p, q)
    assert torch.equal(dense.up, torch.eye(6))
    low = kronecker_product(LowRank(random(3, 2), random(2, 3)), q)
    assert low.rank == 6 and low.shape == (9, 12)
    assert not torch.equal(low.up[:6], torch.eye(6))


def test_dora_needs_an_update_of_the_weights_shape():
    weight = random(2, 1)
    changed = dora_delta(weight, LowRank(torch.zeros(2, 1), random(1, 1)), weight.norm(dim=1))
    assert changed.abs().max() < 1e-6
    with pytest.raises(ConceptError, match="is not one of"):
        dora_delta(random(6, 4), LowRank(random(6, 1), random(1, 3)), torch.ones(6))


@pytest.mark.parametrize("shape", [(6, 4), (3, 5)])
def test_initial_adapters_are_parts_of_the_weight(shape):
    weight = random(*shape)
    u, values, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    pissa = initial_adapter(weight, 2, 7.0, "pissa")
    assert_near(exact(pissa), (u[:, :2] * values[:2]) @ vh[:2], 1e-5)
    assert pissa.up.dtype == torch.float64 and pissa.scale == 1.0
    q, r = torch.linalg.qr(weight.double())
    olora = initial_adapter(weight, 2, 0.5, "olora")
    assert_near(exact(olora), 0.5 * q[:, :2] @ r[:2], 1e-5)
    with pytest.raises(ValueError, match="gaussian"):
        initial_adapter(weight, 2, 1.0, "gaussian")


def test_scales_of_both_factors_multiply():
    p, q = LowRank(random(7, 2), random(2, 9), 0.5), LowRank(random(7, 3), random(3, 9), 3.0)
    both = hadamard_product(p, q)
    assert both.rank == 6 and both.scale == 1.5
    assert_near(exact(both), exact(p) * exact(q), 1e-5)


def test_products_of_half_precision_are_computed_in_float32():
    p = LowRank(random(7, 2).bfloat16(), random(2, 9).bfloat16(), 0.5)
    q = LowRank(random(7, 3, seed=1), random(3, 9, seed=1))
    for a, b in ((p, q), (q, p), (p, p)):
        both = hadamard_product(a, b)
        assert both.up.dtype == both.down.dtype == torch.float32
        assert_near(exact(both), exact(a) * exact(b), 1e-5)
        both = kronecker_product(a, b)
        assert both.up.dtype == both.down.dtype == torch.float32
        assert_near(exact(both), torch.kron(exact(a), exact(b)), 1e-5)


def test_dora_of_a_weight_of_one_row():
    weight, update = random(1, 4), LowRank(random(1, 1), random(1, 4))
    changed = weight.double() + exact(update)
    expected = 3.0 * changed / changed.norm() - weight.double()
    for magnitude in (torch.tensor([3.0]), torch.tensor([[3.0]])):
        assert_near(dora_delta(weight, update, magnitude).double(), expected)

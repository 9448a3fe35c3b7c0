"""Fusion solves its least-squares problem."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from customize.core.lowrank import LowRank, to_dense, weighted_sum
from customize.core.merges.fusion import GENERIC_WEIGHT, fuse_recorded, fusion
from customize.core.merges.method import RecordedInputs
from customize.errors import ConceptError, ConfigError


@st.composite
def problems(draw):
    """Updates of one layer, weights, input factors, preserved inputs, and a ridge."""
    out, width = draw(st.integers(1, 8)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    count = draw(st.integers(1, 4))
    products = [
        LowRank(normal(out, rank), normal(rank, width), draw(st.sampled_from([0.5, 1.0, -2.0])))
        for rank in draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    ]
    weights = draw(st.lists(st.floats(-2, 2), min_size=count, max_size=count))
    inputs = [normal(draw(st.integers(0, 6)), width) for _ in products]
    preserved = normal(draw(st.integers(0, 20)), width) if draw(st.booleans()) else None
    return products, weights, inputs, preserved, draw(st.sampled_from([1e-3, 0.1, 1.0]))


def objective(update, products, weights, inputs, preserved, ridge):
    total = ridge * update.square().sum()
    for p, weight, rows in zip(products, weights, inputs, strict=True):
        target = weight * p.scale * p.up.double() @ p.down.double()
        total = total + ((update - target) @ rows.double().T).square().sum()
    if preserved is not None:
        total = total + (update @ preserved.double().T).square().sum()
    return total


@settings(deadline=None)
@given(problems())
def test_fusion_minimizes_its_objective(problem):
    fused = fusion(*problem[:4], ridge=problem[4])
    assert fused.scale == 1.0
    assert fused.rank == sum(p.rank for p in problem[0])
    update = to_dense(fused).double().requires_grad_()
    value = objective(update, *problem)
    (gradient,) = torch.autograd.grad(value, update)
    # The gradient is zero but for float32 rounding, relative to the gradient at zero.
    start = torch.zeros_like(update).requires_grad_()
    (initial,) = torch.autograd.grad(objective(start, *problem), start)
    assert gradient.abs().max() <= 1e-3 * (1 + initial.abs().max())


def test_fusion_reproduces_concepts_with_orthogonal_inputs():
    generator = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator))
    inputs = [axes[:6], axes[6:12], axes[12:18]]
    # Each update responds to the inputs of all concepts, so that a sum would blend them.
    products = [
        LowRank(torch.randn(10, 4, generator=generator), torch.randn(4, 24, generator=generator))
        for _ in inputs
    ]
    fused = to_dense(fusion(products, [1.0, 0.5, -1.0], inputs, axes[18:], ridge=1e-6))
    for p, weight, rows in zip(products, [1.0, 0.5, -1.0], inputs, strict=True):
        torch.testing.assert_close(fused @ rows.T, weight * to_dense(p) @ rows.T, atol=1e-4, rtol=0)
    assert (fused @ axes[18:].T).abs().max() < 1e-4


def test_fusion_keeps_the_up_projections():
    generator = torch.Generator().manual_seed(1)
    products = [
        LowRank(torch.randn(5, 2, generator=generator), torch.randn(2, 7, generator=generator), 2.0)
        for _ in range(2)
    ]
    inputs = [torch.randn(3, 7, generator=generator) for _ in products]
    fused = fusion(products, [1.0, 0.5], inputs)
    expected = torch.cat([2.0 * products[0].up, 0.5 * 2.0 * products[1].up], dim=1)
    torch.testing.assert_close(fused.up, expected)


def test_invalid_arguments_are_refused():
    p = LowRank(torch.ones(3, 1), torch.ones(1, 4))
    rows = torch.eye(4)
    for bad, message in (
        ({"inputs": [rows, rows]}, "1 updates need the inputs of as many concepts, not of 2"),
        ({"weights": [math.nan]}, "weight is nan"),
        ({"weights": [1.0, 1.0]}, "2 weights"),
        ({"ridge": 0.0}, "invalid ridge 0.0"),
        ({"ridge": math.inf}, "invalid ridge inf"),
    ):
        with pytest.raises(ConfigError, match=message):
            fusion(**{"updates": [p], "weights": [1.0], "inputs": [rows], **bad})
    for bad in ({"inputs": [torch.eye(3)]}, {"preserved": torch.eye(5)}):
        with pytest.raises(ConceptError, match="do not fit a layer of width 4"):
            fusion(**{"updates": [p], "weights": [1.0], "inputs": [rows], **bad})
    with pytest.raises(ConceptError, match="nothing to merge"):
        fusion([], [], [])


def test_fusing_recorded_inputs_weighs_generic_moments_and_adds_unrecorded_updates():
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    updates = [LowRank(normal(5, 2), normal(2, 9)) for _ in range(3)]
    weights = [1.0, -0.5, 2.0]
    inputs = [normal(4, 9), None, normal(3, 9)]
    preserved, generic = [normal(2, 9)], [normal(5, 9), normal(3, 9)]
    merged = fuse_recorded(updates, weights, RecordedInputs(inputs, preserved, generic))

    # By the definition, in float64, with second moments in place of factors.
    moments = [rows.double().T @ rows.double() for rows in (inputs[0], inputs[2])]
    total = 1e-4 * torch.eye(9, dtype=torch.float64) + sum(moments)
    total = total + preserved[0].double().T @ preserved[0].double()
    total = total + 0.1 * sum(rows.double().T @ rows.double() for rows in generic)
    solved = sum(
        weight * to_dense(update).double() @ moment
        for weight, update, moment in zip(
            [1.0, 2.0], [updates[0], updates[2]], moments, strict=True
        )
    )
    expected = solved @ torch.linalg.inv(total) - 0.5 * to_dense(updates[1]).double()
    torch.testing.assert_close(to_dense(merged).double(), expected, atol=1e-4, rtol=1e-4)
    assert GENERIC_WEIGHT == 0.1


def test_updates_without_recorded_inputs_are_summed():
    p, q = LowRank(torch.ones(3, 1), torch.ones(1, 4)), LowRank(torch.eye(3), torch.ones(3, 4))
    merged = fuse_recorded([p, q], [1.0, 2.0], RecordedInputs([None, None], [torch.eye(4)]))
    assert torch.equal(to_dense(merged), to_dense(weighted_sum([p, q], [1.0, 2.0])))


def test_updates_of_half_precision_are_fused_in_float32():
    """A weight of one third times a bfloat16 number is not a bfloat16 number."""
    generator = torch.Generator().manual_seed(3)
    up, down = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((5, 2), (2, 7)))
    rows = torch.randn(9, 7, generator=generator)
    fused = fusion([LowRank(up, down)], [1 / 3], [rows], ridge=1e-9)
    assert fused.up.dtype == fused.down.dtype == torch.float32
    expected = up.double() @ down.double() / 3
    torch.testing.assert_close(to_dense(fused).double(), expected, atol=1e-6, rtol=0)


def test_recorded_updates_are_fused_without_any_inputs_to_preserve():
    generator = torch.Generator().manual_seed(4)
    updates = [
        LowRank(torch.randn(5, 2, generator=generator), torch.randn(2, 7, generator=generator))
        for _ in range(2)
    ]
    inputs = [torch.randn(3, 7, generator=generator) for _ in updates]
    merged = fuse_recorded(updates, [1.0, 0.5], RecordedInputs(inputs))
    expected = to_dense(fusion(updates, [1.0, 0.5], inputs))
    torch.testing.assert_close(to_dense(merged), expected)

"""Fusion solves its least-squares problem, and a sketch of inputs is near what was seen."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from customize.core.fusion import InputMoment, fusion
from customize.core.lowrank import LowRank, to_dense
from customize.errors import ConceptError, ConfigError


@st.composite
def problems(draw):
    """Updates of one layer, weights, factors of inputs, and some inputs to be left alone."""
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
    left_alone = normal(draw(st.integers(0, 20)), width) if draw(st.booleans()) else None
    return products, weights, inputs, left_alone, draw(st.sampled_from([1e-3, 0.1, 1.0]))


def objective(update, products, weights, inputs, left_alone, ridge):
    total = ridge * update.square().sum()
    for p, weight, rows in zip(products, weights, inputs, strict=True):
        wanted = weight * p.scale * p.up.double() @ p.down.double()
        total = total + ((update - wanted) @ rows.double().T).square().sum()
    if left_alone is not None:
        total = total + (update @ left_alone.double().T).square().sum()
    return total


@settings(deadline=None)
@given(problems())
def test_it_is_the_minimum_of_its_objective(problem):
    fused = fusion(*problem[:4], ridge=problem[4])
    assert fused.scale == 1.0
    assert fused.rank == sum(p.rank for p in problem[0])
    update = to_dense(fused).double().requires_grad_()
    value = objective(update, *problem)
    (slope,) = torch.autograd.grad(value, update)
    # Rounding to float32 is what is left, against the slope at no update at all.
    start = torch.zeros_like(update).requires_grad_()
    (steepest,) = torch.autograd.grad(objective(start, *problem), start)
    assert slope.abs().max() <= 1e-3 * (1 + steepest.abs().max())


def test_concepts_of_separate_inputs_keep_just_what_they_do():
    generator = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator))
    inputs = [axes[:6], axes[6:12], axes[12:18]]
    # Updates that answer to everybody's inputs: a sum would blend them.
    products = [
        LowRank(torch.randn(10, 4, generator=generator), torch.randn(4, 24, generator=generator))
        for _ in inputs
    ]
    fused = to_dense(fusion(products, [1.0, 0.5, -1.0], inputs, axes[18:], ridge=1e-6))
    for p, weight, rows in zip(products, [1.0, 0.5, -1.0], inputs, strict=True):
        torch.testing.assert_close(fused @ rows.T, weight * to_dense(p) @ rows.T, atol=1e-4, rtol=0)
    assert (fused @ axes[18:].T).abs().max() < 1e-4


def test_its_up_projections_are_the_concepts_own():
    generator = torch.Generator().manual_seed(1)
    products = [
        LowRank(torch.randn(5, 2, generator=generator), torch.randn(2, 7, generator=generator), 2.0)
        for _ in range(2)
    ]
    inputs = [torch.randn(3, 7, generator=generator) for _ in products]
    fused = fusion(products, [1.0, 0.5], inputs)
    expected = torch.cat([2.0 * products[0].up, 0.5 * 2.0 * products[1].up], dim=1)
    torch.testing.assert_close(fused.up, expected)


def test_bad_input():
    p = LowRank(torch.ones(3, 1), torch.ones(1, 4))
    rows = torch.eye(4)
    for bad, what in (
        ({"inputs": [rows, rows]}, "inputs of 2 concepts were given for 1"),
        ({"weights": [math.nan]}, "weight is nan"),
        ({"weights": [1.0, 1.0]}, "2 weights"),
        ({"ridge": 0.0}, "ridge cannot be 0.0"),
        ({"ridge": math.inf}, "ridge cannot be inf"),
    ):
        with pytest.raises(ConfigError, match=what):
            fusion(**{"products": [p], "weights": [1.0], "inputs": [rows], **bad})
    for bad in ({"inputs": [torch.eye(3)]}, {"left_alone": torch.eye(5)}):
        with pytest.raises(ConceptError, match="do not enter a layer of width 4"):
            fusion(**{"products": [p], "weights": [1.0], "inputs": [rows], **bad})
    with pytest.raises(ConceptError, match="nothing to merge"):
        fusion([], [], [])


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 2**31))
def test_a_moment_of_few_channels_is_exact(width, count, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator)
    moment = InputMoment(width, columns=16)
    moment.add(rows[: count // 2].half().float().unsqueeze(0))
    moment.add(rows[count // 2 :])
    seen = torch.cat([rows[: count // 2].half().float(), rows[count // 2 :]]).double()
    exact = seen.T @ seen / seen.square().sum()
    factor = moment.factor(width).double()
    assert moment.count == count
    torch.testing.assert_close(factor.T @ factor, exact, atol=5e-6, rtol=0)
    # The leading directions come first.
    strengths = factor.square().sum(1)
    assert bool((strengths[:-1] >= strengths[1:] - 1e-7).all())


def test_a_sketch_of_wide_inputs_keeps_the_leading_directions():
    generator = torch.Generator().manual_seed(3)
    axes, _ = torch.linalg.qr(torch.randn(600, 40, generator=generator))
    strength = 2.0 ** -torch.arange(40)
    rows = torch.randn(2000, 40, generator=generator) * strength @ axes.T
    moment = InputMoment(600, columns=48)
    for part in rows.split(100):
        moment.add(part)
    factor = moment.factor(8).double()
    exact = rows.double().T @ rows.double() / rows.double().square().sum()
    values, vectors = torch.linalg.eigh(exact)
    best = vectors[:, -8:] @ (values[-8:, None] * vectors[:, -8:].T)
    assert factor.shape == (8, 600)
    torch.testing.assert_close(factor.T @ factor, best, atol=1e-5, rtol=0)


def test_a_moment_without_inputs_or_with_broken_ones_says_so():
    with pytest.raises(ConceptError, match="no inputs of the layer were recorded"):
        InputMoment(4).factor(2)
    moment = InputMoment(4)
    moment.add(torch.full((1, 4), math.nan))
    with pytest.raises(ConceptError, match="energy nan"):
        moment.factor(2)

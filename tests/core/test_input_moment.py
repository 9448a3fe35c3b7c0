"""A sketch of a layer's inputs approximates their second moment."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from customize.core.input_moment import InputMoment
from customize.errors import ConceptError


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 2**31))
def test_sketch_of_few_channels_is_exact(width, count, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator)
    moment = InputMoment(width, columns=16)
    moment.add(rows[: count // 2].half().float().unsqueeze(0))
    moment.add(rows[count // 2 :])
    inputs = torch.cat([rows[: count // 2].half().float(), rows[count // 2 :]]).double()
    exact = inputs.T @ inputs / inputs.square().sum()
    factor = moment.factor(width).double()
    assert moment.count == count
    torch.testing.assert_close(factor.T @ factor, exact, atol=5e-6, rtol=0)
    # The leading directions come first.
    strengths = factor.square().sum(1)
    assert bool((strengths[:-1] >= strengths[1:] - 1e-7).all())


def test_sketch_of_wide_inputs_keeps_the_leading_directions():
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


def test_missing_or_non_finite_inputs_are_refused():
    with pytest.raises(ConceptError, match="no inputs of the layer were recorded"):
        InputMoment(4).factor(2)
    moment = InputMoment(4)
    moment.add(torch.full((1, 4), math.nan))
    with pytest.raises(ConceptError, match="energy nan"):
        moment.factor(2)


def test_weak_directions_keep_their_share_down_to_a_millionth():
    """Powers of two, mixed by a Hadamard matrix, so that every sum is exact in float32."""
    hadamard = torch.ones(1, 1)
    for _ in range(4):
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    sizes = 2.0 ** -torch.arange(16.0)
    moment = InputMoment(16)
    moment.add(sizes[:, None] * hadamard)
    factor = moment.factor(16)
    assert factor.dtype == torch.float32
    shares = sizes.double().square() / sizes.double().square().sum()
    expected = shares[shares > 1e-6]
    torch.testing.assert_close(factor.double().square().sum(1), expected, rtol=1e-2, atol=0)
    direction = factor[-1] / factor[-1].norm()
    assert abs(float(direction @ hadamard[len(expected) - 1]) / 4) == pytest.approx(1.0, abs=1e-4)


def test_a_sketch_gives_at_most_its_number_of_directions():
    generator = torch.Generator().manual_seed(0)
    moment = InputMoment(40, columns=4)
    moment.add(torch.randn(100, 3, generator=generator) @ torch.randn(3, 40, generator=generator))
    assert moment.factor(2).shape == (2, 40)
    assert moment.factor(10).shape == (3, 40)

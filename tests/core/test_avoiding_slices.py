"""Slices outside of the leading directions of a layer's inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from customize.core.avoiding_slices import (
    captured_energy,
    relative_output_change,
    residual_energy,
    scaled_down_projection,
)
from customize.core.bases import (
    BASES,
    block,
    complement_projection,
    count_shared_directions,
    down_projection,
)
from customize.core.input_moment import InputMoment
from customize.errors import ConfigError


def random_directions(count: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator)


@settings(deadline=None, max_examples=60)
@given(st.integers(8, 96), st.integers(0, 6), st.sampled_from(sorted(BASES)), st.integers(0, 99))
def test_slices_are_orthonormal_disjoint_and_orthogonal_to_avoided_directions(
    width, count, kind, seed
):
    directions = random_directions(count, width, seed)
    slices = [
        complement_projection(BASES[kind], directions, block(index, width - count, 2), 3)
        for index in range((width - count) // 2)
    ]
    whole = torch.cat(slices).double()
    torch.testing.assert_close(whole @ whole.T, torch.eye(len(whole)).double(), atol=1e-5, rtol=0)
    if count:
        unit = directions / directions.norm(dim=1, keepdim=True)
        assert (whole.float() @ unit.T).abs().max() < 1e-5


def test_without_directions_the_slice_is_that_of_the_paper():
    plain = down_projection(BASES["cosine"], 24, block(1, 24, 4), 7, 0.5)
    same = complement_projection(BASES["cosine"], torch.zeros(0, 24), block(1, 24, 4), 7, 0.5)
    assert torch.equal(plain, same)


def test_at_most_an_eighth_of_the_directions_is_avoided():
    assert [count_shared_directions(width, 16) for width in (4, 8, 64, 128, 3072)] == [
        0,
        1,
        8,
        16,
        16,
    ]
    assert count_shared_directions(128, 0) == 0


def inputs_of(width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a layer's inputs with few strong directions, and their factor."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.cat([torch.full((4,), 10.0), torch.full((width - 4,), 0.5)])
    axes, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    rows = torch.randn(4000, width, generator=generator) * strength @ axes
    moment = InputMoment(width)
    moment.add(rows)
    return rows, moment.factor(width)


def test_generic_inputs_have_the_mean_energy_of_a_slice_that_avoids_nothing():
    rows, factor = inputs_of(64)
    avoiding = [
        scaled_down_projection(BASES["cosine"], factor, block(k, 56, 4), 0, avoid=16)
        for k in range(14)
    ]
    loudness = (rows @ torch.cat(avoiding).T).square().mean()
    assert loudness == pytest.approx(float(rows.square().mean()), rel=0.01)
    # What they avoid is most of the energy, so it takes long rows.
    assert residual_energy(factor, 16) < 0.05
    assert avoiding[0].norm(dim=1).min() > 3


def test_rows_are_limited_to_length_ten():
    factor = torch.eye(64)[:8] / 8**0.5  # all energy in what is avoided
    down = scaled_down_projection(BASES["cosine"], factor, block(0, 56, 4), 0, avoid=8)
    torch.testing.assert_close(down.norm(dim=1), torch.full((4,), 10.0))
    half = scaled_down_projection(BASES["cosine"], factor, block(0, 56, 4), 0, avoid=8, scale=0.5)
    torch.testing.assert_close(half, 0.5 * down)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6))
def test_relative_output_change_matches_dense_products(seed):
    rows, factor = inputs_of(48, seed % 7)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(20, 48, generator=generator)
    down = scaled_down_projection(BASES["cosine"], factor, block(seed % 10, 42, 4), 0, avoid=6)
    up = torch.randn(20, 4, generator=generator)
    # Its rows see alike much, so a random up-projection changes what any of its norm does.
    share = (rows @ down.T @ (2.0 * up).T).square().sum() / (rows @ weight.T).square().sum()
    told = relative_output_change(down, factor, weight, 2.0) * float(up.square().sum())
    assert told == pytest.approx(float(share), rel=0.35)
    assert relative_output_change(down, factor, torch.zeros(20, 48), 1.0) == 0.0


def test_columns_outside_the_complement_are_refused():
    with pytest.raises(ConfigError, match="do not exist in an orthogonal matrix of width 56"):
        complement_projection(BASES["cosine"], random_directions(8, 64), [56], 0)


def test_captured_energy_is_the_share_in_a_span():
    factor = torch.diag(torch.tensor([0.6, 0.8, 0.0])).sqrt()
    factor = factor / factor.square().sum().sqrt()
    shares = factor.square().sum(1).tolist()
    first = torch.tensor([[2.0, 0.0, 0.0]])
    assert captured_energy(factor, torch.zeros(0, 3)) == 0.0
    assert captured_energy(factor, first) == pytest.approx(shares[0])
    assert captured_energy(factor, torch.eye(3)[[1, 0]] * -3) == pytest.approx(1.0)
    mixed = torch.tensor([[1.0, 1.0, 0.0], [1.0, -1.0, 0.0]])
    assert captured_energy(factor, mixed) == pytest.approx(1.0)
    assert captured_energy(factor, mixed[:1]) == pytest.approx(0.5)


def test_rows_have_length_ten_where_nothing_is_left():
    factor = torch.eye(64)[:4] / 2.0  # of energy 1 exactly, in the directions that are avoided
    assert residual_energy(factor, 8) == 0.0
    down = scaled_down_projection(BASES["cosine"], factor, block(0, 56, 4), 0, avoid=8)
    torch.testing.assert_close(down.norm(dim=1), torch.full((4,), 10.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_energy_that_a_factor_does_not_contain_is_spread_evenly(dtype):
    """By traces with the dense second moment, in float64, for a weight of small outputs."""
    _, factor = inputs_of(48)
    seen = factor[:6].to(dtype)
    generator = torch.Generator().manual_seed(1)
    weight = (1e-2 * torch.randn(20, 48, generator=generator)).to(dtype)
    down = random_directions(4, 48)
    rows = seen.double()
    unseen = 1 - float(rows.square().sum())
    moment = rows.T @ rows + unseen / 48 * torch.eye(48)

    def energy(matrix):
        return float((matrix.double() @ moment @ matrix.double().T).trace())

    assert 0.005 < unseen < 0.5
    found = relative_output_change(down, seen, weight, 0.7)
    assert found == pytest.approx(0.7**2 * energy(down) / (4 * energy(weight)), rel=1e-5)

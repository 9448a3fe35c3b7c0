"""Masks of mid-activations, their owners, and masks from attention maps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from customize.core.lowrank import LowRank, weighted_sum
from customize.core.merges.average import average
from customize.core.merges.fusion import fusion
from customize.core.routing import (
    attention_bias,
    attention_to_tokens,
    competing_masks,
    grid_of_tokens,
    own_down,
    rank_mask,
    rank_owners,
    resize_masks,
    smooth_maps,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def updates(*ranks, out=12, width=20):
    return [
        LowRank(normal(out, rank, seed=k), normal(rank, width, seed=9 + k), 0.5)
        for k, rank in enumerate(ranks)
    ]


def test_owners_are_those_of_the_stacked_up_projections():
    parts = updates(2, 3, 1)
    inputs = [normal(30, 20, seed=20 + k) for k in range(3)]
    for merged in (
        weighted_sum(parts, [1.0, 0.3, -2.0]),
        average(parts, [1.0, 1.0, 0.5]),
        fusion(parts, [0.7, 1.0, 1.0], inputs),
    ):
        ups = [part.up for part in parts]
        assert rank_owners(merged.up, ups) == [0, 0, 1, 1, 1, 2]
        assert rank_owners(merged.up.bfloat16(), ups) == [0, 0, 1, 1, 1, 2]
        moved = torch.cat([merged.up[:, 2:], merged.up[:, :2]], 1)
        assert rank_owners(moved, ups) == [1, 1, 1, 2, 0, 0]
        assert rank_owners(merged.up + 0.1 * normal(12, 6, seed=5), ups) is None


def test_a_concept_of_rank_or_weight_zero_owns_what_remains():
    first, second = updates(2, 3)
    nothing = LowRank(first.up[:, :0], first.down[:0])
    assert rank_owners(second.up, [nothing.up, second.up]) == [1, 1, 1]
    merged = weighted_sum([first, second], [0.0, 1.0])
    assert rank_owners(merged.up, [first.up, second.up]) == [0, 0, 1, 1, 1]


def test_merges_whose_ranks_are_mixed_have_no_owners():
    first, second = updates(3, 3)
    same_slice = LowRank(second.up, first.down, second.scale)
    assert rank_owners(weighted_sum([first, same_slice], [1, 1]).up, [first.up, second.up]) is None
    wide = updates(8, 8)  # more ranks than the weight has: a dense sum
    assert rank_owners(weighted_sum(wide, [1, 1]).up, [part.up for part in wide]) is None


def test_a_mask_splits_a_merge_into_its_concepts():
    parts, x = updates(2, 3), normal(2, 7, 20)
    merged = weighted_sum(parts, [1.0, 0.3])
    owners = rank_owners(merged.up, [part.up for part in parts])
    masks = torch.rand(2, 2, 7, generator=torch.Generator().manual_seed(4))
    mask = rank_mask(masks, owners)
    assert mask.shape == (2, 7, 5)
    routed = ((x @ merged.down.T) * mask) @ merged.up.T
    alone = [w * p.scale * (x @ p.down.T) @ p.up.T for w, p in zip((1, 0.3), parts, strict=True)]
    expected = sum(masks[:, k, :, None] * alone[k] for k in range(2))
    assert torch.allclose(routed, expected, atol=1e-5)


@pytest.mark.parametrize("weights", [(0.7, 1.0, 1.0), (-2.0, 0.3, 1.0), (1.0, 0.0, 1.0)])
def test_own_down_projections_undo_a_merge(weights):
    parts, x = updates(2, 3, 1), normal(7, 20)
    inputs = [normal(30, 20, seed=20 + k) for k in range(3)]
    alone = [w * p.scale * (x @ p.down.T) @ p.up.T for w, p in zip(weights, parts, strict=True)]
    for merged in (fusion(parts, weights, inputs), average(parts, weights)):
        second_first = merged.up[:, [2, 3, 4, 0, 1, 5]]
        for up in (merged.up, second_first) if all(weights) else (merged.up,):
            owners = rank_owners(up, [part.up for part in parts])
            down = own_down(up, owners, parts, weights)
            assert down.shape == (6, 20) and down.dtype == torch.float32
            for index, expected in enumerate(alone):
                mask = torch.tensor([float(owner == index) for owner in owners])
                routed = ((x @ down.T) * mask) @ up.T
                assert torch.allclose(routed, expected, atol=1e-4), index
        assert not torch.allclose(x @ merged.down.T @ merged.up.T, sum(alone), atol=1e-2)


@pytest.mark.parametrize("grid", [(3, 5), (8, 8), (7, 12), (16, 10)])
def test_ones_and_zeros_stay_exact_on_every_grid(grid):
    ones = resize_masks(torch.ones(2, 7, 6), *grid)
    assert ones.shape == (2, *grid) and bool((ones == 1).all())
    assert float(resize_masks(torch.zeros(2, 7, 6), *grid).max()) <= 1e-6


def test_smaller_grids_have_the_means_of_cells():
    masks = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(4))
    expected = functional.avg_pool2d(masks, 2)
    assert torch.allclose(resize_masks(masks, 4, 4), expected, atol=1e-6)


def test_grids_of_a_unet_halve_and_round_up():
    assert grid_of_tokens(64, 8, 8) == (8, 8)
    assert grid_of_tokens(15, 10, 6) == (5, 3)
    assert grid_of_tokens(6, 10, 6) == (3, 2)
    assert grid_of_tokens(77, 8, 8) is None


def test_attention_is_the_mean_of_softmaxes_over_the_heads():
    query, key = normal(2, 5, 8), normal(2, 3, 8, seed=1)
    result = attention_to_tokens(query, key, heads=2, scale=0.5)
    heads = [(0.5 * query[..., s] @ key[..., s].mT).softmax(-1) for s in (slice(0, 4), slice(4, 8))]
    assert torch.allclose(result, (heads[0] + heads[1]) / 2, atol=1e-6)
    assert torch.allclose(result.sum(-1), torch.ones(2, 5))


def test_maps_are_smoothed_over_neighbours():
    maps = torch.zeros(1, 5, 5)
    maps[0, 2, 2] = 9.0
    expected = torch.zeros(1, 5, 5)
    expected[0, 1:4, 1:4] = 1.0
    assert torch.allclose(smooth_maps(maps), expected)
    assert torch.allclose(smooth_maps(torch.full((2, 4, 4), 0.3)), torch.full((2, 4, 4), 0.3))


def test_masks_add_up_to_one_and_follow_what_is_attended_to():
    maps = torch.full((2, 6, 6), 0.01)
    maps[0, :, :3], maps[1, :, 3:] = 0.02, 0.5  # the second is attended to far more
    masks = competing_masks(maps, 0.1)
    assert torch.allclose(masks.sum(0), torch.ones(6, 6))
    assert float(masks[0, :, :2].min()) > 0.9 and float(masks[1, :, 4:].min()) > 0.9
    swapped = competing_masks(maps.flip(0), 0.1)
    assert torch.equal(swapped.flip(0), masks)
    softer = competing_masks(maps, 1.0)
    assert float(softer[0, 0, 0]) < float(masks[0, 0, 0])


def test_maps_that_tie_share_the_picture_equally():
    for maps in (torch.rand(1, 4, 4).expand(3, 4, 4), torch.zeros(3, 4, 4)):
        assert torch.allclose(competing_masks(maps, 0.1), torch.full((3, 4, 4), 1 / 3))


def test_attention_to_a_concept_is_in_proportion_to_its_mask():
    masks = torch.tensor([[1.0, 0.5, 0.0, 0.5], [0.0, 0.5, 1.0, 0.1]])
    tokens = ((1, 2), (4,))
    bias = attention_bias(masks, tokens, 6)
    scores = normal(4, 6)
    attended, plain = (scores + bias).softmax(-1), scores.softmax(-1)
    # Relative to the words that are no concept's, which keep their shares.
    ratio = (attended / attended[:, :1]) / (plain / plain[:, :1])
    for mask, positions in zip(masks, tokens, strict=True):
        expected = (mask / mask.mean())[:, None].expand(-1, len(positions))
        assert torch.allclose(ratio[:, list(positions)], expected, atol=1e-3)
    assert torch.allclose(ratio[:, [0, 3, 5]], torch.ones(4, 3))


@given(st.floats(0, 1), st.integers(1, 9))
def test_masks_of_one_value_leave_attention_as_it_is(value, positions):
    bias = attention_bias(torch.full((2, positions), value), ((0,), (2, 3)), 4)
    assert bias.shape == (positions, 4) and float(bias.abs().max()) <= 1e-5


def test_masks_of_ones_add_exact_zeros():
    assert not bool(attention_bias(torch.ones(2, 7), ((0,), (2,)), 4).any())

"""Preservation losses against plain computations, and what holds for all inputs."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from customize.core.preservation import (
    POOLINGS,
    PRESERVATIONS,
    class_text,
    common_positions,
    context_text,
    cosine_distance,
    gather_positions,
    normalize_rows,
    output,
)
from customize.errors import TrainingError

SHAPES = {
    "class_text": (3, 8),
    "context_text": (3, 5, 8),
    "output": (3, 4, 6, 6),
    "context_output": (3, 4, 6, 6),
}
NAMES = pytest.mark.parametrize("name", PRESERVATIONS)
SEEDS = st.integers(0, 2**32 - 1)
BEGIN, END = 98, 99


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_loss_is_in_the_table():
    assert SHAPES.keys() == PRESERVATIONS.keys()


@NAMES
def test_what_is_preserved_costs_nothing_and_what_is_not_does(name):
    ours, base = normal(*SHAPES[name]), normal(*SHAPES[name], seed=1)
    loss = PRESERVATIONS[name]
    assert loss(ours, ours.clone(), None).abs() < 1e-6
    assert loss(ours, base, None) > 0.1
    assert loss(ours, base, None).shape == ()


@NAMES
@given(seed=SEEDS)
def test_a_step_downhill_comes_nearer_to_the_base(name, seed):
    ours = normal(*SHAPES[name], seed=seed).requires_grad_()
    base = normal(*SHAPES[name], seed=seed + 1)
    before = PRESERVATIONS[name](ours, base, None)
    before.backward()
    with torch.no_grad():
        after = PRESERVATIONS[name](ours - 1e-2 * ours.grad, base, None)
    assert after < before
    assert base.grad is None


@NAMES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_full(name, dtype):
    ours, base = normal(*SHAPES[name]).to(dtype), normal(*SHAPES[name], seed=1).to(dtype)
    found = PRESERVATIONS[name](ours, base, None)
    assert found.dtype == torch.float32
    assert found == PRESERVATIONS[name](ours.float(), base.float(), None)


@NAMES
def test_shapes_that_do_not_fit_are_refused(name):
    shape = SHAPES[name]
    for other in ((shape[0] + 1, *shape[1:]), shape[1:], (*shape, 1)):
        with pytest.raises(TrainingError):
            PRESERVATIONS[name](normal(*shape), normal(*other), None)
    with pytest.raises(TrainingError):
        PRESERVATIONS[name](normal(*shape), normal(*shape), normal(shape[0] + 1))


@given(seed=SEEDS, scale=st.floats(0.01, 100))
def test_cosine_distance_is_of_angles_alone(seed, scale):
    a, b = normal(4, 8, seed=seed), normal(4, 8, seed=seed + 1)
    found = cosine_distance(a, b)
    plain = [
        1 - float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)) for x, y in zip(a, b, strict=True)
    ]
    assert torch.allclose(found, torch.tensor(plain), atol=1e-5)
    assert torch.allclose(cosine_distance(scale * a, b), found, atol=1e-5)
    assert torch.allclose(cosine_distance(b, a), found, atol=1e-6)
    assert bool((found >= -1e-6).all()) and bool((found <= 2 + 1e-6).all())
    assert torch.allclose(cosine_distance(a, -a), torch.full((4,), 2.0))


def test_weights_are_factors():
    a, b = normal(3, 8), normal(3, 8, seed=1)
    weight = torch.tensor([2.0, 0.0, 1.0])
    assert torch.isclose(class_text(a, b, weight), (cosine_distance(a, b) * weight).mean())
    a, b = normal(3, 4, 6, 6), normal(3, 4, 6, 6, seed=1)
    plain = ((a - b) ** 2).mean((1, 2, 3))
    assert torch.isclose(output(a, b, weight), (plain * weight).mean())
    assert torch.isclose(output(a, b), plain.mean())


@given(seed=SEEDS, lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_context_is_a_mean_over_each_prompts_own_positions(seed, lengths):
    """However long the others are, and whatever fills the shorter ones up."""
    longest = max(lengths)
    a = normal(len(lengths), longest, 8, seed=seed)
    b = normal(len(lengths), longest, 8, seed=seed + 1)
    counts = torch.tensor([[place < n for place in range(longest)] for n in lengths])
    weight = normalize_rows(counts)
    assert torch.allclose(weight.sum(1), torch.ones(len(lengths)))
    alone = [cosine_distance(x[:n], y[:n]).mean() for x, y, n in zip(a, b, lengths, strict=True)]
    found = context_text(a, b, weight)
    assert torch.isclose(found, torch.stack(alone).mean(), atol=1e-6)
    filled = torch.where(counts[..., None], a, torch.full_like(a, 7.0))
    assert torch.isclose(context_text(filled, b, weight), found, atol=1e-6)


def test_a_row_in_which_nothing_counts_is_no_division_by_zero():
    assert normalize_rows(torch.tensor([[False, False], [True, True]])).tolist() == [
        [0, 0],
        [0.5, 0.5],
    ]


WORDS = st.lists(st.integers(0, 9), max_size=6)


@given(before=WORDS, ours=WORDS, base=WORDS, after=WORDS)
def test_alignment_pairs_the_same_words_once_each(before, ours, base, after):
    a = [BEGIN, *before, *ours, *after, END]
    b = [BEGIN, *before, *base, *after, END]
    own, theirs = common_positions(a, b)
    assert [a[i] for i in own] == [b[i] for i in theirs]
    assert own == sorted(set(own)) and theirs == sorted(set(theirs))
    # Never less than what is known to be common.
    assert len(own) >= min(len(before) + len(after) + 2, len(a), len(b))
    # In order, and without a gap but the one in the middle.
    for places, length in ((own, len(a)), (theirs, len(b))):
        gaps = [y - x for x, y in pairwise(places) if y - x != 1]
        assert len(gaps) <= 1 and places[0] == 0 and places[-1] == length - 1


def test_a_concept_of_more_tokens_than_the_class_shifts_what_follows():
    photo, of, a, dog, on, beach, rex, rex_1, rex_2 = range(1, 10)
    ours = [BEGIN, photo, of, rex, rex_1, rex_2, on, beach, END]
    base = [BEGIN, photo, of, a, dog, on, beach, END]
    assert common_positions(ours, base) == ([0, 1, 2, 6, 7, 8], [0, 1, 2, 5, 6, 7])


def test_poolings_part_where_an_id_is_above_the_end():
    new = END + 1
    told = {name: pool([BEGIN, 3, new, 4, END, END], END) for name, pool in POOLINGS.items()}
    assert told == {"end": 4, "published": 2}
    told = {name: pool([BEGIN, 3, 4, END, END], END) for name, pool in POOLINGS.items()}
    assert told == {"end": 3, "published": 3}
    with pytest.raises(ValueError):
        POOLINGS["end"]([BEGIN, 3], END)


def test_states_are_taken_at_each_rows_positions():
    hidden = torch.arange(24.0).reshape(2, 4, 3)
    found = gather_positions(hidden, torch.tensor([[3, 0], [1, 1]]))
    assert torch.equal(found[0], hidden[0, [3, 0]]) and torch.equal(found[1], hidden[1, [1, 1]])

import collections

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from customize.training.data.batches import choose_images, draw_noise, stream_seed


def pick(turn, size=2, count=5, seed=0, flip=False, dropout=0.0, stream="concept"):
    return choose_images(seed, turn, size, count, flip=flip, dropout=dropout, stream=stream)


def test_every_image_is_used_once_before_any_is_repeated():
    drawn = [number for turn in range(10) for number in pick(turn).indices]
    for epoch in range(4):
        assert sorted(drawn[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert drawn[:5] != drawn[5:10] or drawn[:5] != drawn[10:15]


def test_two_small_batches_equal_one_large_batch():
    """Accumulation and several processes use the same images as one large batch."""
    whole = pick(3, size=4).indices
    assert pick(6, size=2).indices + pick(7, size=2).indices == whole


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(1, 5), st.integers(0, 3))
def test_a_batch_has_one_group_and_all_images_are_used_equally_often(groups, size, epoch):
    count = len(groups)
    turns = range(epoch * count, (epoch + 1) * count)
    batches = [
        choose_images(
            7, turn, size, count, flip=False, dropout=0.0, stream="x", groups=groups
        ).indices
        for turn in turns
    ]
    assert all(len(batch) == size for batch in batches)
    assert all(len({groups[number] for number in batch}) == 1 for batch in batches)
    drawn = collections.Counter(number for batch in batches for number in batch)
    assert drawn == dict.fromkeys(range(count), size)
    alike = [number for batch in batches for number in batch if groups[number] == groups[0]]
    group_size = groups.count(groups[0])
    for first in range(0, len(alike), group_size):
        assert len(set(alike[first : first + group_size])) == group_size


def test_one_group_equals_no_groups():
    for turn in range(12):
        plain = choose_images(3, turn, 2, 5, flip=True, dropout=0.1, stream="x")
        assert plain == choose_images(
            3, turn, 2, 5, flip=True, dropout=0.1, stream="x", groups="aaaaa"
        )


def test_groups_are_in_random_order():
    def order(seed):
        batches = [
            choose_images(
                seed, turn, 1, 8, flip=False, dropout=0, stream="x", groups="aaaabbbb"
            ).indices
            for turn in range(8)
        ]
        return [batch[0] // 4 for batch in batches]

    assert len({tuple(order(seed)) for seed in range(9)}) > 4


def test_draws_depend_on_seed_turn_and_stream_only():
    def of(**changes):
        choice = pick(**{"turn": 4, "size": 64, "flip": True, "dropout": 0.5, **changes})
        return choice.mirrored, choice.dropped

    torch.manual_seed(1)
    first = of()
    torch.manual_seed(2)
    assert of() == first
    assert of(turn=5) != first and of(seed=1) != first and of(stream="class") != first
    assert of(flip=False)[0] == [False] * 64
    assert of(dropout=0.0) == (first[0], [False] * 64)


def test_flips_and_dropped_captions_have_the_requested_probability():
    draws = [pick(turn, size=8, flip=True, dropout=0.2) for turn in range(400)]
    mirrored = collections.Counter(m for d in draws for m in d.mirrored)
    dropped = collections.Counter(s for d in draws for s in d.dropped)
    assert mirrored[True] / 3200 == pytest.approx(0.5, abs=0.05)
    assert dropped[True] / 3200 == pytest.approx(0.2, abs=0.05)


def test_noise_repeats_and_is_normal():
    generator = torch.Generator()
    a = draw_noise(generator, 7, (64, 4, 8, 8), "uniform", 0.0)
    torch.rand(5, generator=generator)
    b = draw_noise(generator, 7, (64, 4, 8, 8), "uniform", 0.0)
    assert torch.equal(a.noise, b.noise) and torch.equal(a.u, b.u)
    assert a.u.shape == (64,) and bool(((a.u > 0) & (a.u < 1)).all())
    for value in (a.noise, a.latents):
        assert value.shape == (64, 4, 8, 8)
        assert float(value.mean()) == pytest.approx(0, abs=0.03)
        assert float(value.std()) == pytest.approx(1, abs=0.03)
    assert float((a.noise * a.latents).mean()) == pytest.approx(0, abs=0.03)
    offset = draw_noise(generator, 7, (64, 4, 8, 8), "uniform", 0.5).noise - a.noise
    assert float(offset.flatten(2).std(2).max()) < 1e-5
    assert float(offset.std()) == pytest.approx(0.5, abs=0.1)


def test_seeds_differ():
    seeds = {stream_seed(a, b) for a in range(50) for b in ("x", "y")}
    assert len(seeds) == 100 and all(0 <= seed < 2**32 for seed in seeds)
    assert stream_seed(1, 23) != stream_seed(12, 3)

"""References of a target, and their crops."""

from __future__ import annotations

from random import Random

from customize.training.references.stages import STAGES, choose_crop, choose_references


def test_stages_have_the_papers_learning_rates():
    assert [stage.learning_rate for stage in STAGES.values()] == [1e-4, 4e-5, 2e-5]


def test_references_are_shuffled_and_sometimes_fewer():
    rng = Random(0)
    drawn = [choose_references(range(6), rng, 28, 0.4) for _ in range(4000)]
    sizes = [len(chosen) for chosen in drawn]
    assert {*sizes} == {2, 3, 4, 5, 6}
    # A subset has 2 to 5 of 6, with equal probability.
    assert abs(sizes.count(6) / 4000 - 0.6) < 0.03
    assert all(abs(sizes.count(size) / 4000 - 0.1) < 0.02 for size in (2, 3, 4, 5))
    assert all(len({*chosen}) == len(chosen) for chosen in drawn)
    firsts = [chosen[0] for chosen in drawn]
    assert all(abs(firsts.count(k) / 4000 - 1 / 6) < 0.03 for k in range(6))


def test_number_of_references_is_bounded():
    rng = Random(0)
    sizes = {len(choose_references(range(40), rng, 28, 0.4)) for _ in range(500)}
    assert max(sizes) == 28 and min(sizes) >= 2
    assert {len(choose_references(range(n), rng, 28, 1.0)) for n in (2,) * 50} == {2}
    assert choose_references([5], rng, 28, 1.0) == [5]


def test_crop_is_inside_the_image():
    rng = Random(0)
    for size in ((40, 30), (1, 1), (3, 100)):
        for _ in range(200):
            left, top, right, bottom = choose_crop(size, rng)
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
            assert right - left == bottom - top >= min(size) / 2 - 0.5

"""Weighted sums of rewards, and their floors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from customize.errors import ConfigError, PipelineError
from customize.evaluation.rewards import Picture, WeightedSum, score
from tests.evaluation.making import pictures
from tests.evaluation.rewards.making import PROMPTS, ColourReward

CHANNELS = {name: ColourReward(index, name) for index, name in enumerate(("red", "green", "blue"))}
NUMBERS = st.floats(-3, 3).filter(lambda number: number == 0 or abs(number) > 1e-3)
COLOURS = st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=6)


def plain(colours: Sequence[tuple[int, ...]]) -> tuple[list[Image.Image], list[str]]:
    """One-coloured pictures, whose scores are their colours by 255."""
    return [Image.new("RGB", (4, 4), colour) for colour in colours], ["a"] * len(colours)


def weighted(weights: Sequence[float], floors: Sequence[float] | None = None) -> WeightedSum:
    names = list(CHANNELS)
    return WeightedSum(
        dict(zip(names, weights, strict=True)),
        floors=None if floors is None else dict(zip(names, floors, strict=True)),
        rewards=CHANNELS,
    )


weights_lists = st.tuples(NUMBERS, NUMBERS, NUMBERS).filter(any)
floors_lists = st.tuples(*[st.floats(0, 1)] * 3)


@settings(deadline=None, max_examples=50)
@given(colours=COLOURS, weights=weights_lists, floors=floors_lists)
def test_totals_and_floors(
    colours: list[tuple[int, ...]], weights: tuple[float, ...], floors: tuple[float, ...]
) -> None:
    images, prompts = plain(colours)
    result = weighted(weights, floors).evaluate(images, prompts)
    exact = [[value / 255 for value in colour] for colour in colours]
    for row, values in enumerate(exact):
        total = math.fsum(w * v for w, v in zip(weights, values, strict=True))
        assert math.isclose(result.total[row], total, rel_tol=1e-5, abs_tol=1e-5)
    scores = torch.stack([result.scores[name] for name in CHANNELS], dim=1)
    torch.testing.assert_close(scores, torch.tensor(exact, dtype=torch.float32))
    for row in range(len(colours)):
        passes = all(s >= f for s, f in zip(scores[row].tolist(), floors, strict=True))
        assert bool(result.passes[row]) == passes
    assert not result.failed.any() and result.reasons == {}


@settings(deadline=None, max_examples=50)
@given(
    colours=COLOURS,
    weights=weights_lists,
    factor=st.floats(0.01, 10),
    floors=floors_lists,
    raised=floors_lists,
    data=st.data(),
)
def test_properties(
    colours: list[tuple[int, ...]],
    weights: tuple[float, ...],
    factor: float,
    floors: tuple[float, ...],
    raised: tuple[float, ...],
    data: st.DataObject,
) -> None:
    images, prompts = plain(colours)
    result = weighted(weights, floors).evaluate(images, prompts)
    # The total is linear in the weights, and has no part in the floors.
    scaled = weighted([factor * w for w in weights], floors).evaluate(images, prompts)
    torch.testing.assert_close(scaled.total, factor * result.total, rtol=1e-4, atol=1e-5)
    assert torch.equal(scaled.passes, result.passes)
    assert torch.equal(weighted(weights)(images, prompts), result.total)
    # Each picture is scored alone.
    order = data.draw(st.permutations(range(len(colours))))
    other = weighted(weights, floors).evaluate([images[i] for i in order], prompts)
    assert torch.equal(other.total, result.total[list(order)])
    assert torch.equal(other.passes, result.passes[list(order)])
    # Higher floors pass no picture that failed lower ones.
    higher = [max(a, b) for a, b in zip(floors, raised, strict=True)]
    stricter = weighted(weights, higher).evaluate(images, prompts)
    assert not (stricter.passes & ~result.passes).any()


def test_a_score_at_its_floor_passes() -> None:
    images, prompts = plain([(51, 0, 0), (50, 0, 0)])
    floor = score(CHANNELS["red"], images, prompts).values[0].item()
    summed = WeightedSum({"red": 1.0}, {"red": floor}, {"red": CHANNELS["red"]})
    assert summed.evaluate(images, prompts).passes.tolist() == [True, False]


def test_a_weight_of_0_makes_a_floor_only() -> None:
    images, prompts = plain([(255, 0, 0), (0, 255, 0)])
    summed = WeightedSum({"red": 1.0, "green": 0}, {"green": 0.5}, dict(list(CHANNELS.items())[:2]))
    result = summed.evaluate(images, prompts)
    assert result.total.tolist() == [1.0, 0.0] and result.passes.tolist() == [False, True]


class Fails(ColourReward):
    """Raises on pictures of one width."""

    def __init__(self, width: int) -> None:
        super().__init__(1, "fails")
        self.width = width

    def __call__(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> torch.Tensor:
        if any(getattr(picture, "width", 0) == self.width for picture in pictures):
            raise ValueError(f"width {self.width}")
        return super().__call__(pictures, prompts)


def test_a_failure_of_one_reward_fails_the_picture() -> None:
    images = pictures(3)  # of widths 50, 51, 52
    summed = WeightedSum(
        {"red": 1.0, "fails": 0.0}, rewards={"red": CHANNELS["red"], "fails": Fails(51)}
    )
    result = summed.evaluate(images, PROMPTS)
    assert result.failed.tolist() == [False, True, False] == (~result.passes).tolist()
    assert result.total.isnan().tolist() == result.failed.tolist()
    assert not result.scores["red"].isnan().any()
    assert result.reasons == {1: "fails: width 51"}
    # As a reward of its own, and inside another sum.
    outer = WeightedSum({"sum": 2.0}, {"sum": -1.0}, {"sum": summed})
    for got in (score(summed, images, PROMPTS), outer.evaluate(images, PROMPTS)):
        assert got.failed.tolist() == result.failed.tolist()
    torch.testing.assert_close(outer(images, PROMPTS), 2 * summed(images, PROMPTS), equal_nan=True)


def test_rewards_that_fail_on_different_pictures_leave_none() -> None:
    both = {"a": Fails(50), "b": Fails(51)}
    with pytest.raises(PipelineError, match=r"none of 2 pictures was scored by all.*: a: width 50"):
        WeightedSum({"a": 1.0, "b": 1.0}, rewards=both).evaluate(pictures(2), PROMPTS[:2])


def test_pictures_are_checked() -> None:
    images: Any = (image for image in pictures(3))
    with pytest.raises(ConfigError, match="pictures are of type generator, not a sequence"):
        weighted((1, 1, 1)).evaluate(images, PROMPTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {}}, "there are no weights"),
        ({"weights": {"red": 0}}, "all weights are 0"),
        ({"weights": {"red": math.nan}}, r"nan is not a finite number.*weights\['red'\]"),
        ({"weights": {"red": "1"}}, "'1' is not a finite number"),
        ({"weights": {"red": True}}, "True is not a finite number"),
        ({"weights": ["red"]}, "not a mapping"),
        ({"weights": {"red": 1}, "floors": {"rad": 1}}, "'rad' has no weight.*did you mean red"),
        ({"weights": {"red": 1}, "floors": {"red": math.inf}}, "inf is not a finite number"),
        ({"weights": {"red": 1}, "rewards": CHANNELS}, "'green' has no weight"),
        ({"weights": {"purple": 1}}, "unknown reward 'purple'"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], message: str) -> None:
    rewards = {"red": CHANNELS["red"]} if "red" in settings["weights"] else {}
    with pytest.raises(ConfigError, match=message):
        WeightedSum(**{"rewards": rewards} | settings)


def test_digests_depend_on_all_parts() -> None:
    sums = [
        weighted((1, 1, 1)),
        weighted((1, 1, 2)),
        weighted((1, 1, 1), (0, 0, 0)),
        WeightedSum({"red": 1.0}, rewards={"red": CHANNELS["red"]}),
        WeightedSum({"red": 1.0}, rewards={"red": CHANNELS["green"]}),
    ]
    assert len({one.digest for one in sums}) == len(sums)
    assert weighted((1, 1, 1)).digest == sums[0].digest

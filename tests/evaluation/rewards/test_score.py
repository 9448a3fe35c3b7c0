"""What rewards return is checked, and failures on single pictures are counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from customize.errors import ConfigError, PipelineError
from customize.evaluation.rewards import Picture, score
from tests.evaluation.making import pictures
from tests.evaluation.rewards.making import PROMPTS, ColourReward

RED, BROKEN = ColourReward(), 1


class Returns:
    """A reward that returns what a function makes of the true scores."""

    name, digest = "test", "0"

    def __init__(self, change: Callable[[torch.Tensor], Any]) -> None:
        self.change, self.calls = change, 0

    def __call__(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> Any:
        self.calls += 1
        return self.change(RED(pictures, prompts))


class RaisesOnSize(Returns):
    """A reward that raises on pictures of some widths."""

    def __init__(self, *widths: int) -> None:
        super().__init__(lambda scores: scores)
        self.widths = widths

    def __call__(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> Any:
        scores = super().__call__(pictures, prompts)
        for picture in pictures:
            if isinstance(picture, Image.Image) and picture.width in self.widths:
                raise ValueError(f"width {picture.width}\nand more")
        return scores


def test_scores_are_those_of_the_reward() -> None:
    images = pictures(3)
    result = score(RED, images, PROMPTS)
    assert torch.equal(result.values, RED(images, PROMPTS))
    assert not result.failed.any() and result.reasons == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda scores: scores.double(),
        lambda scores: scores.requires_grad_(),
        lambda scores: scores.clone().to(torch.bfloat16).float().to(torch.bfloat16),
        lambda scores: (scores * 1000).round().long(),
    ],
)
def test_dtypes_are_converted(change: Callable[[torch.Tensor], Any]) -> None:
    images = pictures(3)
    values = score(Returns(change), images, PROMPTS).values
    assert (values.dtype, values.device.type, values.requires_grad) == (
        torch.float32,
        "cpu",
        False,
    )
    torch.testing.assert_close(values, change(RED(images, PROMPTS)).detach().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scores: scores[:, None], r"scores of shape \(3, 1\) for 3 pictures"),
        (lambda scores: scores.mean(), r"scores of shape \(\) for 3 pictures"),
        (lambda scores: scores[:2], r"scores of shape \(2,\) for 3 pictures.*shape \(3,\)"),
        (lambda scores: scores.tolist(), "returned list, not a tensor of real numbers"),
        (lambda scores: None, "returned NoneType, not a tensor"),
        (lambda scores: scores + 0j, "returned torch.complex64, not a tensor of real numbers"),
    ],
)
def test_other_outputs_are_refused(change: Callable[[torch.Tensor], Any], message: str) -> None:
    reward = Returns(change)
    with pytest.raises(PipelineError, match=message):
        score(reward, pictures(3), PROMPTS)
    assert reward.calls == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_failures(value: float) -> None:
    result = score(
        Returns(lambda scores: scores.masked_fill(torch.arange(3) == BROKEN, value)),
        pictures(3),
        PROMPTS,
    )
    assert result.failed.tolist() == [False, True, False]
    assert result.values.isnan().tolist() == [False, True, False]
    assert result.reasons == {BROKEN: f"it returned {value}"}


def test_a_picture_on_which_the_reward_raises_is_dropped_and_counted() -> None:
    images = pictures(3)  # of widths 50, 51, 52
    reward = RaisesOnSize(51)
    result = score(reward, images, PROMPTS)
    assert reward.calls == 4
    assert (int(result.failed.sum()), result.reasons) == (1, {1: "width 51"})
    assert torch.equal(result.values[::2], RED(images, PROMPTS)[::2])
    assert result.values[1].isnan()


def test_an_error_of_the_batch_alone_costs_no_picture() -> None:
    class Small(Returns):
        def __call__(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> Any:
            if len(pictures) > 1:
                raise RuntimeError("out of memory")
            return super().__call__(pictures, prompts)

    images = pictures(3)
    result = score(Small(lambda scores: scores), images, PROMPTS)
    assert torch.equal(result.values, RED(images, PROMPTS)) and not result.failed.any()


@pytest.mark.parametrize("count", [1, 3])
def test_failure_on_all_pictures_is_an_error(count: int) -> None:
    which = "all 3 pictures" if count == 3 else "1 picture"
    reward = RaisesOnSize(50, 51, 52)
    with pytest.raises(PipelineError, match=f"failed on {which}: width 50.*test"):
        score(reward, pictures(count), PROMPTS[:count])
    assert reward.calls == (4 if count == 3 else 1)
    with pytest.raises(PipelineError, match="it returned nan"):
        score(Returns(lambda scores: scores * math.nan), pictures(count), PROMPTS[:count])


def test_a_truncated_file_fails_alone(tmp_path: Any) -> None:
    images = pictures(2)
    images[1].resize((400, 400)).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with Image.open(tmp_path / "cut.png") as cut:
        result = score(RED, [images[0], cut], PROMPTS[:2])
    assert result.failed.tolist() == [False, True] and "truncated" in result.reasons[1]


def test_interrupts_end_the_run() -> None:
    def interrupt(scores: torch.Tensor) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(Returns(interrupt), pictures(3), PROMPTS)


def test_pictures_are_checked_before_the_reward_is_called() -> None:
    reward = Returns(lambda scores: scores)
    with pytest.raises(ConfigError, match="2 prompts for 3 pictures"):
        score(reward, pictures(3), PROMPTS[:2])
    assert reward.calls == 0


def test_the_callers_autocast_and_dtype_change_nothing() -> None:
    images = pictures(3)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = score(RED, images, PROMPTS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(result.values, RED(images, PROMPTS))

"""Pictures and videos: what is refused, which frames are scored, and their mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from customize.errors import ConfigError
from customize.evaluation.rewards.frames import FRAMES, check_pictures, sample_frames
from tests.evaluation.making import pictures
from tests.evaluation.rewards.making import ColourReward, videos

IMAGE = Image.new("RGB", (8, 8))


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        ([], [], "no pictures to score"),
        ([IMAGE, IMAGE], ["a dog"], "1 prompt for 2 pictures.*one prompt for each picture"),
        (IMAGE, ["a dog"], "pictures are of type Image, not a sequence"),
        ([IMAGE], "a dog", "prompts are of type str, not a sequence"),
        ([IMAGE], [None], r"the prompt None is not a text.*prompts\[0\]"),
        ([IMAGE, []], ["a", "b"], r"the video has no frames.*pictures\[1\]"),
        (["dog.png"], ["a dog"], r"the picture is of type str, not a PIL image.*pictures\[0\]"),
        ([np.zeros((8, 8, 3))], ["a dog"], "the picture is of type ndarray"),
        ([[IMAGE, None]], ["a dog"], r"the frame is of type NoneType.*pictures\[0\]\[1\]"),
    ],
)
def test_malformed_pictures_and_prompts_are_refused(
    images: Any, prompts: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_pictures(images, prompts)
    with pytest.raises(ConfigError, match=message):
        ColourReward()(images, prompts)


@given(length=st.integers(1, 60), count=st.integers(2, 8))
def test_frames_are_evenly_spaced(length: int, count: int) -> None:
    frames = [Image.new("RGB", (1, 1), (index, 0, 0)) for index in range(length)]
    chosen = [frame.getpixel((0, 0))[0] for frame in sample_frames(frames, count)]
    if length <= count:
        assert chosen == list(range(length))
    else:
        gaps = np.diff(chosen)
        assert (chosen[0], chosen[-1], len(chosen)) == (0, length - 1, count)
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_videos_have_the_mean_of_four_frames() -> None:
    reward, clips = ColourReward(), videos(2, 10)
    image = pictures(1)[0]
    scores = reward([clips[0], image, clips[1]], ["a"] * 3)
    assert FRAMES == 4
    for clip, score in zip(clips, scores[[0, 2]], strict=True):
        frames = [clip[position] for position in (0, 3, 6, 9)]
        torch.testing.assert_close(score, reward(frames, ["a"] * 4).mean())
    torch.testing.assert_close(scores[1], reward([image], ["a"])[0])


def test_transparent_pictures_are_scored_on_white() -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    scores = ColourReward()([clear, Image.new("L", (8, 8), 51)], ["a", "b"])
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.2]))

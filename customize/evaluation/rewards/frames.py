"""Pictures and videos as lists of images; scores of videos by image models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from customize.core.precision import full_precision
from customize.decode_image import to_rgb
from customize.errors import ConfigError
from customize.evaluation.rewards.reward import Picture
from customize.text import plural, quote

#: Frames of a video that image models score, as in Prompt-A-Video.
FRAMES = 4

_NOT_SEQUENCES = (str, bytes, Image.Image)


def check_pictures(pictures: Sequence[Picture], prompts: Sequence[str]) -> list[list[Image.Image]]:
    """Return the frames of each picture or video, after checking what the caller gave.

    Raises:
        ConfigError: There are no pictures, an entry is not an image or has no frames, prompts are
            not texts, or the numbers of pictures and prompts differ.
    """
    if not isinstance(pictures, Sequence) or isinstance(pictures, _NOT_SEQUENCES):
        raise ConfigError(
            f"pictures are {_kind(pictures)}, not a sequence",
            where="pictures",
            fix="give a list with a PIL image, or a list of frames, for each prompt",
        )
    if not isinstance(prompts, Sequence) or isinstance(prompts, str | bytes):
        raise ConfigError(
            f"prompts are {_kind(prompts)}, not a sequence",
            where="prompts",
            fix="give a list with one prompt for each picture",
        )
    if not pictures:
        raise ConfigError("there are no pictures to score", where="pictures", fix="give some")
    if len(pictures) != len(prompts):
        raise ConfigError(
            f"{plural(len(prompts), 'prompt')} for {plural(len(pictures), 'picture')}",
            where="prompts",
            fix="give one prompt for each picture",
        )
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ConfigError(
                f"the prompt {quote(prompt)} is not a text",
                where=f"prompts[{index}]",
                fix="give the prompt that the user wrote",
            )
    return [_frames(picture, index) for index, picture in enumerate(pictures)]


def sample_frames(frames: Sequence[Image.Image], count: int) -> list[Image.Image]:
    """Return at most `count` evenly spaced frames, the first and the last among them, as RGB."""
    if len(frames) > count:
        positions = torch.linspace(0, len(frames) - 1, count, dtype=torch.float64)
        frames = [frames[int(position)] for position in positions.round()]
    return [frame if frame.mode == "RGB" else to_rgb(frame) for frame in frames]


@full_precision(tf32=True)
@torch.no_grad()
def mean_over_frames(
    score_images: Callable[[list[Image.Image], list[str]], Tensor],
    pictures: Sequence[Picture],
    prompts: Sequence[str],
    count: int = FRAMES,
) -> Tensor:
    """Score pictures with an image model, and videos by the mean over evenly spaced frames.

    Args:
        score_images: Returns the scores (m,) of m RGB images for m prompts.
        pictures: n images or lists of frames.
        prompts: n prompts.
        count: Frames of each video.

    Returns:
        Scores (n,).

    Raises:
        ConfigError: See :func:`check_pictures`.
    """
    videos = [sample_frames(frames, count) for frames in check_pictures(pictures, prompts)]
    repeated = [prompt for video, prompt in zip(videos, prompts, strict=True) for _ in video]
    scores = score_images([frame for video in videos for frame in video], repeated)
    return torch.stack([part.mean() for part in scores.split([len(video) for video in videos])])


def _frames(picture: Any, index: int) -> list[Image.Image]:
    where = f"pictures[{index}]"
    if isinstance(picture, Image.Image):
        return [picture]
    if not isinstance(picture, Sequence) or isinstance(picture, str | bytes):
        raise ConfigError(
            f"the picture is {_kind(picture)}, not a PIL image",
            where=where,
            fix="give a PIL image, or a list of PIL images for a video",
        )
    if not picture:
        raise ConfigError("the video has no frames", where=where, fix="give its frames, or drop it")
    for position, frame in enumerate(picture):
        if not isinstance(frame, Image.Image):
            raise ConfigError(
                f"the frame is {_kind(frame)}, not a PIL image",
                where=f"{where}[{position}]",
                fix='give PIL images (output_type="pil" of pipelines)',
            )
    return list(picture)


def _kind(value: Any) -> str:
    return f"of type {type(value).__name__}"

"""Calling rewards: all checks of what they return."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from customize.core.precision import full_precision
from customize.errors import PipelineError, first_line
from customize.evaluation.rewards.frames import check_pictures
from customize.evaluation.rewards.reward import Picture, Reward
from customize.text import plural, shorten


@dataclass(frozen=True)
class Scores:
    """Scores of n pictures.

    Attributes:
        values: (n,) float32 on the CPU; NaN where the reward failed.
        failed: (n,) bool: pictures without a score.
        reasons: Index of a failed picture -> what went wrong.
    """

    values: Tensor
    failed: Tensor
    reasons: dict[int, str]


@full_precision(tf32=True)
@torch.no_grad()
def score(reward: Reward, pictures: Sequence[Picture], prompts: Sequence[str]) -> Scores:
    """Call a reward, and keep the pictures that it can score.

    If the reward raises an exception, it is called again for each picture alone. A picture on which
    it raises, or for which it returns NaN or infinity, has failed. Other dtypes and devices are
    converted.

    Args:
        reward: The reward.
        pictures: n images or lists of frames.
        prompts: n prompts as the user wrote them.

    Raises:
        ConfigError: The pictures or prompts are malformed, see
            :func:`customize.evaluation.rewards.frames.check_pictures`.
        PipelineError: The reward failed on all pictures, or returned something else than one number
            for each picture.
    """
    check_pictures(pictures, prompts)
    count = len(pictures)
    reasons: dict[int, str] = {}
    first: Exception | None = None
    try:
        output: Any = reward(pictures, prompts)
    except Exception as error:  # rewards are other people's models
        first = error
    if first is None:
        values = _check_scores(reward, output, count)
    else:
        values = torch.full((count,), math.nan)
        for index in range(count) if count > 1 else ():
            try:
                output = reward([pictures[index]], [prompts[index]])
            except Exception as error:
                reasons[index] = _reason(error)
                continue
            values[index] = _check_scores(reward, output, 1)[0]
        if count == 1:
            reasons[0] = _reason(first)
    failed = ~values.isfinite()
    for index in failed.nonzero()[:, 0].tolist():
        reasons.setdefault(index, f"it returned {values[index].item()}")
    if failed.all():
        raise PipelineError(
            f"the reward failed on {'all ' * (count > 1)}{plural(count, 'picture')}: {reasons[0]}",
            where=reward.name,
            fix="try it with one picture, or drop it",
        ) from first
    return Scores(values.masked_fill(failed, math.nan), failed, reasons)


def _check_scores(reward: Reward, output: Any, count: int) -> Tensor:
    """Return the output as a tensor (count,) float32 on the CPU."""
    if not isinstance(output, Tensor) or output.is_complex():
        kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise PipelineError(
            f"the reward returned {kind}, not a tensor of real numbers",
            where=reward.name,
            fix=f"let it return a tensor of shape ({count},)",
        )
    if output.shape != (count,):
        raise PipelineError(
            f"the reward returned scores of shape {tuple(output.shape)}"
            f" for {plural(count, 'picture')}",
            where=reward.name,
            fix=f"let it return a tensor of shape ({count},)",
        )
    return output.detach().to("cpu", torch.float32)


def _reason(error: Exception) -> str:
    """The first line of an error."""
    return shorten(first_line(error), 300)

"""The weighted sum of rewards, with the least score of each (Prompt-A-Video, arXiv:2412.15156)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from customize.core.precision import full_precision
from customize.errors import ConfigError, PipelineError
from customize.evaluation.rewards.frames import check_pictures
from customize.evaluation.rewards.registry import load_reward
from customize.evaluation.rewards.reward import Picture, Reward
from customize.evaluation.rewards.score import score
from customize.near_names import suggest_names
from customize.text import plural, quote


@dataclass(frozen=True)
class WeightedScores:
    """Scores of n pictures by a weighted sum; all tensors are on the CPU.

    Attributes:
        total: (n,) float32, the weighted sum; NaN where a reward failed.
        scores: Name -> scores (n,) float32 of the reward, NaN where it failed.
        passes: (n,) bool: no score is below its floor, and no reward failed. Only these pictures
            may be the chosen one of a pair.
        failed: (n,) bool: pictures on which a reward failed.
        reasons: Index of a failed picture -> the reward and what went wrong.
    """

    total: Tensor
    scores: dict[str, Tensor]
    passes: Tensor
    failed: Tensor
    reasons: dict[int, str]


class WeightedSum:
    """The sum of weights times scores, which is a reward itself.

    Args:
        weights: Name of a reward -> its weight; 0 for a reward that only has a floor.
        floors: Name of a reward -> its least score. Pictures below it do not pass.
        rewards: Name -> reward, for names that :func:`load_reward` would not load as wanted. The
            others are loaded with the default models.
        device: Device that loaded models run on.

    Raises:
        ConfigError: There are no weights, a number is not finite, or a floor or reward belongs to
            no weight.
        PipelineError: A reward cannot be loaded.
    """

    name = "weighted_sum"

    def __init__(
        self,
        weights: Mapping[str, float],
        floors: Mapping[str, float] | None = None,
        rewards: Mapping[str, Reward] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.weights = _check_numbers(weights, "weights")
        self.floors = _check_numbers(floors or {}, "floors")
        given = dict(rewards or {})
        if not any(self.weights.values()):
            raise ConfigError(
                "all weights are 0" if self.weights else "there are no weights",
                where="weights",
                fix='give at least one, such as {"clip": 1.0}',
            )
        for where, names in (("floors", self.floors), ("rewards", given)):
            for name in names:
                if name not in self.weights:
                    raise ConfigError(
                        f"{quote(name)} has no weight",
                        where=where,
                        fix=suggest_names(name, list(self.weights)),
                    )
        self.rewards: dict[str, Reward] = {
            name: given[name] if name in given else load_reward(name, device=device)
            for name in self.weights
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 of weights, floors, and the digests of the rewards."""
        parts = {
            name: [reward.name, reward.digest, self.weights[name], self.floors.get(name)]
            for name, reward in self.rewards.items()
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def __call__(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> Tensor:
        """Sums (n,); NaN for a picture on which a reward failed."""
        return self.evaluate(pictures, prompts).total

    @full_precision(tf32=True)
    @torch.no_grad()
    def evaluate(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> WeightedScores:
        """Score pictures with all rewards.

        Args:
            pictures: n images or lists of frames.
            prompts: n prompts as the user wrote them.

        Raises:
            ConfigError: The pictures or prompts are malformed.
            PipelineError: No picture was scored by all rewards, or a reward returned something else
                than one number for each picture.
        """
        count = len(check_pictures(pictures, prompts))
        total = torch.zeros(count, dtype=torch.float64)
        passes = torch.ones(count, dtype=torch.bool)
        failed = torch.zeros(count, dtype=torch.bool)
        scores: dict[str, Tensor] = {}
        reasons: dict[int, str] = {}
        for name, reward in self.rewards.items():
            result = score(reward, pictures, prompts)
            scores[name] = result.values
            failed |= result.failed
            passes &= result.values.double() >= self.floors.get(name, -math.inf)  # false for NaN
            total += self.weights[name] * result.values.double()
            for index, reason in result.reasons.items():
                reasons.setdefault(index, f"{name}: {reason}")
        if failed.all():
            raise PipelineError(
                f"none of {plural(count, 'picture')} was scored by all rewards: {reasons[0]}",
                where=", ".join(self.rewards),
                fix="score the pictures with each reward alone",
            )
        return WeightedScores(total.float(), scores, passes, failed, reasons)


def _check_numbers(numbers: Mapping[str, float], where: str) -> dict[str, float]:
    if not isinstance(numbers, Mapping):
        raise ConfigError(
            f"{where} are {quote(numbers)}, not a mapping",
            where=where,
            fix='give a number for each name, such as {"clip": 1.0}',
        )
    for name, number in numbers.items():
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not math.isfinite(number):
            raise ConfigError(
                f"{quote(number)} is not a finite number",
                where=f"{where}[{quote(name)}]",
                fix="give a number such as 1.0",
            )
    return {name: float(number) for name, number in numbers.items()}

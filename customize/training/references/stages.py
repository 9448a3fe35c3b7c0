"""The stages of training: what is trained, and which references a target has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        learning_rate: The paper's learning rate.
        trains_mllm: Whether the MLLM before its final layer, and the LoRA of the attention
            projections, are trained. The final layer with its norm and reference tokens, the
            projector and the keys and values of the reference tokens are trained in all stages.
        holds_out_target: Whether the references are the other images of the target's group. If
            not, the target is its own reference.
    """

    learning_rate: float
    trains_mllm: bool
    holds_out_target: bool


#: Name -> stage, in the order of training.
STAGES = {
    "alignment": Stage(1e-4, trains_mllm=False, holds_out_target=False),
    "single": Stage(4e-5, trains_mllm=True, holds_out_target=False),
    "multi": Stage(2e-5, trains_mllm=True, holds_out_target=True),
}


def choose_references(
    candidates: Sequence[T], rng: Random, max_references: int, subset_probability: float
) -> list[T]:
    """Choose references of a target: shuffled, at most ``max_references``, sometimes fewer.

    Args:
        candidates: The images of the group without the target, at least one.
        rng: Source of random numbers.
        max_references: Largest number of references.
        subset_probability: Probability of a random count from 2 to one less than all, where more
            than two are left.
    """
    chosen = rng.sample(list(candidates), min(len(candidates), max_references))
    if len(chosen) > 2 and rng.random() < subset_probability:
        del chosen[rng.randint(2, len(chosen) - 1) :]
    return chosen


def choose_crop(size: tuple[int, int], rng: Random) -> tuple[int, int, int, int]:
    """Choose a square part of an image, with a side of 1/2 to 1 of its shorter side.

    Args:
        size: (width, height) of the image in pixels.
        rng: Source of random numbers.

    Returns:
        (left, top, right, bottom) in pixels.
    """
    width, height = size
    side = max(1, round(min(size) * rng.uniform(0.5, 1.0)))
    left, top = rng.randint(0, width - side), rng.randint(0, height - side)
    return left, top, left + side, top + side

"""The prompts of the study: those that rewriters are taught on, and the held-out ones.

Held-out prompts have combinations that no training of a rewriter has, and their unseen words are
the last third of the list of synonyms, which only definitions name.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from customize.storybook.user_prompts import KINDS, UserPrompt, write_user_prompt
from storybook_rewriter.corpus import random_trigger

TRAINING_SEED, TUNING_SEED, HELD_OUT_SEED = 61_000, 62_000, 63_000


def training_prompts(count: int) -> list[UserPrompt]:
    """Prompts of all kinds in turn; half of the last kind have a trigger, a different one each."""
    return _prompts(TRAINING_SEED, count, random_trigger)


def tuning_prompts(count: int) -> list[UserPrompt]:
    """Further ones, by which settings are chosen."""
    return _prompts(TUNING_SEED, count, random_trigger)


def held_out_prompts(count: int, trigger: str = "") -> list[UserPrompt]:
    """Held-out prompts of all kinds in turn; half of the last kind have the trigger."""
    return _prompts(HELD_OUT_SEED, count, lambda rng: trigger, held_out=True)


def _prompts(
    seed: int,
    count: int,
    write_trigger: Callable[[np.random.Generator], str],
    held_out: bool = False,
) -> list[UserPrompt]:
    prompts: dict[str, UserPrompt] = {}
    number = 0
    while len(prompts) < count:
        rng = np.random.default_rng((seed, number))
        kind = KINDS[len(prompts) % len(KINDS)]
        has_trigger = kind == KINDS[-1] and len(prompts) // len(KINDS) % 2 == 0
        trigger = write_trigger(rng) if has_trigger else ""
        prompt = write_user_prompt(rng, kind, held_out, trigger=trigger)
        prompts.setdefault(prompt.text, prompt)
        number += 1
    return list(prompts.values())

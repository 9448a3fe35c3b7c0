"""The prompts of the study: those that rewriters are taught on, and the held-out ones.

Held-out prompts have combinations that no training of a rewriter has, and their unseen words are
the last third of the list of synonyms, which only definitions name.
"""

from __future__ import annotations

import numpy as np

from customize.storybook.user_prompts import KINDS, UserPrompt, write_user_prompt

TRAINING_SEED, TUNING_SEED, HELD_OUT_SEED = 61_000, 62_000, 63_000


def training_prompts(count: int) -> list[UserPrompt]:
    """Prompts of all kinds in turn, without triggers."""
    return _prompts(TRAINING_SEED, count, held_out=False)


def tuning_prompts(count: int) -> list[UserPrompt]:
    """Further ones, by which settings are chosen."""
    return _prompts(TUNING_SEED, count, held_out=False)


def held_out_prompts(count: int, trigger: str = "") -> list[UserPrompt]:
    """Held-out prompts of all kinds in turn; half of the last kind have the trigger."""
    return _prompts(HELD_OUT_SEED, count, held_out=True, trigger=trigger)


def _prompts(seed: int, count: int, held_out: bool, trigger: str = "") -> list[UserPrompt]:
    prompts: dict[str, UserPrompt] = {}
    number = 0
    while len(prompts) < count:
        rng = np.random.default_rng((seed, number))
        kind = KINDS[len(prompts) % len(KINDS)]
        has_trigger = len(prompts) // len(KINDS) % 2 == 0
        prompt = write_user_prompt(rng, kind, held_out, trigger=trigger if has_trigger else "")
        prompts.setdefault(prompt.text, prompt)
        number += 1
    return list(prompts.values())

"""The prompts of the study: those that rewriters are taught on, and the held-out ones.

Held-out prompts have combinations that no training of a rewriter has, and their unseen words are
the last third of the list of synonyms, which only definitions name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from customize.storybook.user_prompts import KINDS, UserPrompt, write_user_prompt
from storybook_rewriter.corpus import random_trigger

TRAINING_SEED, TUNING_SEED, HELD_OUT_SEED = 61_000, 62_000, 63_000


def training_prompts(count: int) -> list[UserPrompt]:
    """Prompts of all kinds in turn.

    Of three prompts of the last kind one excludes something, one has a trigger, and one both; each
    trigger is another one.
    """
    return _prompts(TRAINING_SEED, count, _training_prompt)


def tuning_prompts(count: int) -> list[UserPrompt]:
    """Further ones, by which settings are chosen."""
    return _prompts(TUNING_SEED, count, _training_prompt)


def held_out_prompts(count: int, trigger: str = "") -> list[UserPrompt]:
    """Held-out prompts of all kinds in turn; half of the last kind have the trigger."""

    def write(rng: np.random.Generator, kind: str, turn: int) -> UserPrompt:
        return write_user_prompt(rng, kind, held_out=True, trigger="" if turn % 2 else trigger)

    return _prompts(HELD_OUT_SEED, count, write)


def _training_prompt(rng: np.random.Generator, kind: str, turn: int) -> UserPrompt:
    if kind != KINDS[-1] or turn % 3 == 0:
        return write_user_prompt(rng, kind)
    prompt = write_user_prompt(rng, kind, trigger=random_trigger(rng))
    if turn % 3 == 1:
        return prompt
    text, _, _ = prompt.text.rpartition(", ")  # what follows is what it excludes
    return dataclasses.replace(prompt, text=text, excluded={})


def _prompts(
    seed: int, count: int, write: Callable[[np.random.Generator, str, int], UserPrompt]
) -> list[UserPrompt]:
    """Distinct prompts; `write` takes a generator, the kind and the number of its turn."""
    prompts: dict[str, UserPrompt] = {}
    number = 0
    while len(prompts) < count:
        turn, kind = divmod(len(prompts), len(KINDS))
        prompt = write(np.random.default_rng((seed, number)), KINDS[kind], turn)
        prompts.setdefault(prompt.text, prompt)
        number += 1
    return list(prompts.values())

"""Shared by tests of the storybook: random scenes, untrained judges."""

from __future__ import annotations

import numpy as np
import torch

from customize.storybook.judges import AttributeJudge, IdentityJudge, Judges
from customize.storybook.world import Scene, compose_scene, random_identity


def random_scenes(count: int, things: int) -> list[Scene]:
    rng = np.random.default_rng(things)
    return [
        compose_scene(rng, tuple(random_identity(rng) for _ in range(things))) for _ in range(count)
    ]


def random_judges() -> Judges:
    torch.manual_seed(0)
    return Judges(AttributeJudge().eval(), IdentityJudge().eval(), 0.25)

"""Pipelines with two or three concepts, and pictures of them."""

from __future__ import annotations

import pytest
import torch

from tests.pipeline.making import concept
from tests.tiny import drawn, tiny_sd, tiny_sdxl

PROMPT = "a photo of <rex> and <tom> on the beach"
OTHER = "a picture of <tom> and <rex> in the forest"
LEFT = torch.tensor([1.0, 0.0]).expand(2, 2)
HALVES = {"<rex>": LEFT, "tom": 1 - LEFT}
CLASSES = {"rex": "dog", "tom": "cat", "kit": "car"}

makers = pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])


def pair(make=tiny_sd, names=("rex", "tom"), **load):
    pipe = make()
    concepts = [
        concept(pipe, name, index=k, class_word=CLASSES[name]) for k, name in enumerate(names)
    ]
    return pipe.load_custom(*concepts, **load)


def draw(pipe, prompt=PROMPT, seeds=(1,), **call):
    """Draw latents, without ``together=`` if the call does not ask for it."""
    return draw_by_default(pipe, prompt, seeds, **{"together": False} | call)


def draw_by_default(pipe, prompt=PROMPT, seeds=(1,), **call):
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    size = {"num_inference_steps": 6, "height": 32, "width": 32, "output_type": "latent"}
    return drawn(pipe, prompt, generator=noise, **size | call)


def alike(result, expected):
    return torch.allclose(result, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))

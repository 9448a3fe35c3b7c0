"""Cleaned prompts on every family: only the prompt's row of the batch changes."""

from __future__ import annotations

import pytest
import torch

import customize
from customize.families import family_of
from tests.families.test_families import PIPELINES
from tests.pipeline.making import concept
from tests.tiny import drawn


@pytest.mark.parametrize("name", PIPELINES)
def test_only_the_prompts_row_is_cleaned(name):
    pipe = PIPELINES[name]()
    pipe.load_custom(concept(pipe), customize.Decor(negative="keep"))
    family = family_of(pipe.components, pipe.config)
    answers = []

    def draw(**call):
        answers.clear()
        handles = [
            denoiser.register_forward_hook(
                lambda _, args, kwargs, output: answers.append(output[0]), with_kwargs=True
            )
            for denoiser in family.denoisers.values()
        ]
        noise = torch.Generator().manual_seed(1)
        size = {"num_inference_steps": 2, "height": 32, "width": 32}
        drawn(pipe, "a photo of rex and a car", generator=noise, **size, **call)
        for handle in handles:
            handle.remove()
        return list(answers[0])

    plain, cleaned, again = draw(), draw(avoid="red hat, cup"), draw()
    # The row of the empty prompt, if the first call has one, is unchanged.
    changed = [not torch.equal(a, b) for a, b in zip(plain, cleaned, strict=True)]
    assert changed.count(True) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))

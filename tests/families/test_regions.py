"""Regions on every family: within a step, words of a region do not affect another region."""

from __future__ import annotations

import pytest
import torch

from customize.errors import PipelineError
from customize.families import family_of
from tests.families.test_families import PIPELINES
from tests.pipeline.making import concept
from tests.tiny import drawn

PROMPT = "a photo of rex and a red car on the beach"
LEFT = torch.tensor([1.0, 0.0]).expand(2, 2)


@pytest.mark.parametrize("name", PIPELINES)
def test_words_of_a_region_do_not_affect_another(name):
    pipe = PIPELINES[name]()
    pipe.load_custom(concept(pipe))
    family = family_of(pipe.components, pipe.config)
    answers = []

    def note(module, args, kwargs, output):  # after the hooks of regions
        answers.append(output[0])

    def draw(thing, **call):
        answers.clear()
        handles = [
            denoiser.register_forward_hook(note, with_kwargs=True)
            for denoiser in family.denoisers.values()
        ]
        noise = torch.Generator().manual_seed(1)
        size = {"num_inference_steps": 2, "height": 32, "width": 32}
        drawn(pipe, PROMPT.replace("red car", thing), generator=noise, **size, **call)
        for handle in handles:
            handle.remove()
        first = answers[0]
        return torch.stack(first) if isinstance(first, list) else first

    if family.regions_unsupported:
        with pytest.raises(PipelineError, match=f"family {family.name} does not support regions"):
            draw("red car", regions={"red car": 1 - LEFT})
        return
    plain = draw("red car")
    red = draw("red car", regions={"red car": 1 - LEFT})
    blue = draw("blue cup", regions={"blue cup": 1 - LEFT})
    alike = sides_of(family, red == blue)
    assert bool(alike[0].all())
    assert not bool(alike[1].all())
    # The row of the empty prompt, if the call has one, is unchanged.
    changed = [not torch.equal(a, b) for a, b in zip(red, plain, strict=True)]
    assert changed.count(True) == 1


def sides_of(family, answers):
    """Split outputs (batch, ...) into left and right half, in any family's layout."""
    if answers.ndim == 3:  # tokens
        side = round(answers.shape[1] ** 0.5)
        answers = answers.transpose(1, 2).unflatten(2, (side, side))
    middle = answers.shape[-1] // 2
    return answers[..., :middle], answers[..., middle:]

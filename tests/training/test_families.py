"""Training in every family: recomputed activations, batches and two denoisers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from customize.families import family_of
from customize.training.latents_and_embeddings import encode_prompts_once, lookup_conditions
from customize.training.recipe import train
from tests.tiny import tiny_flux3
from tests.tiny_families import TINY_FAMILIES
from tests.tiny_video import tiny_wan
from tests.training.runs import assert_unchanged, same, settings, snapshot, tensors
from tests.training.test_recipe import Stop, crash_at

ALL: dict[str, Callable[[], Any]] = TINY_FAMILIES | {"flux3": tiny_flux3}


@pytest.mark.parametrize("name", ALL)
def test_gradient_checkpointing_gives_the_same_concept(name: str, tmp_path: Path) -> None:
    pipe = ALL[name]()
    family = family_of(pipe.components, pipe.config)
    calls: list[int] = []
    for key, denoiser in family.denoisers.items():
        for layer in family.adapter_targets(key):
            denoiser.get_submodule(layer).register_forward_hook(lambda *_: calls.append(1))
    before = snapshot(pipe.components, pipe.config)
    results, counts = [], []
    for checkpointing in (False, True):
        config = settings(
            tmp_path,
            str(checkpointing),
            gradient_checkpointing=checkpointing,
            steps=2,
        )
        calls.clear()
        arguments = {"components": pipe.components, "pipeline_config": pipe.config}
        results.append(tensors(train(config, progress=False, **arguments)))
        counts.append(len(calls))
    assert same(*results)
    # Not all twice: what condenses prompts is kept, and what nothing is asked of any more.
    assert counts[1] >= 1.5 * counts[0] > 0
    assert_unchanged(before, pipe.components, pipe.config)


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_a_batch_of_prompts_of_different_lengths_equals_single_prompts(name: str) -> None:
    pipe = ALL[name]()
    family = family_of(pipe.components, pipe.config)
    prompts = ["a photo of a dog wearing the red hat on the beach", "a cat", ""]
    mean, _ = family.encode_images(torch.zeros(1, 3, 64, 64))
    noisy = torch.randn(3, *mean.shape[1:], generator=torch.Generator().manual_seed(0))
    t = family.timesteps(torch.tensor([0.2, 0.5, 0.95]), noisy.shape[1:])
    cache = encode_prompts_once(family, prompts)
    together = family.predict(noisy, t, lookup_conditions(cache, prompts))
    for row, prompt in enumerate(prompts):
        index = slice(row, row + 1)
        alone = family.predict(noisy[index], t[index], cache[prompt])
        torch.testing.assert_close(together[index], alone, atol=1e-5, rtol=1e-4)


def test_a_run_resumes_before_one_of_two_denoisers_was_trained(tmp_path: Path) -> None:
    """With a boundary of almost 1, nearly all noise levels belong to the second denoiser."""
    changes = {
        "checkpoint_every": 2,
        "steps": 8,
        "batch_size": 1,
        "timestep_density": "uniform",
        "seed": 1,
    }
    pipe = tiny_wan("2.2-14b", boundary_ratio=0.95)
    arguments = {"components": pipe.components, "pipeline_config": pipe.config}
    called: list[int] = []
    hook = pipe.transformer.register_forward_hook(lambda *_: called.append(step))
    step = 0

    def count(done: int, loss: Any) -> None:
        nonlocal step
        step = done

    whole = train(settings(tmp_path, "a", **changes), progress=False, on_step=count, **arguments)
    assert called and called[0] >= 2, "the first one is to come after the checkpoint"
    hook.remove()
    config = settings(tmp_path, "b", **changes)
    with pytest.raises(Stop):
        train(config, progress=False, on_step=crash_at(2 * (called[0] // 2) + 1), **arguments)
    resumed = train(config, progress=False, **arguments)
    assert same(tensors(whole), tensors(resumed))

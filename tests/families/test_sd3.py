"""Stable Diffusion 3: shifted flow timesteps, three encoders, refused settings."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from customize.errors import ConfigError, PipelineError
from customize.families import family_of
from customize.families.sd3 import MAX_SEQUENCE_LENGTH
from tests.tiny import CLIP_LENGTH, tiny_sd3


def test_timesteps_have_the_schedulers_shift() -> None:
    pipe = tiny_sd3()
    family = family_of(pipe.components)
    # A new scheduler has the shifted levels 1000 / 1000, 999 / 1000, ..., 1 / 1000.
    table = pipe.scheduler.timesteps
    assert table[500] != 500
    u = torch.arange(1000, 0, -1) / 1000
    torch.testing.assert_close(family.timesteps(u, (4, 16, 16)), table)
    pipe.scheduler.set_shift(1.0)
    torch.testing.assert_close(family.timesteps(u, (4, 16, 16)), 1000 * u)


def test_timesteps_do_not_depend_on_the_state_of_the_pipelines_scheduler() -> None:
    pipe = tiny_sd3()
    family = family_of(pipe.components)
    u = torch.tensor([0.1, 0.5, 0.9])
    before = family.timesteps(u, (4, 16, 16))
    pipe("a dog", num_inference_steps=2)
    assert torch.equal(family.timesteps(u, (4, 16, 16)), before)


def test_noise_is_the_schedulers() -> None:
    pipe = tiny_sd3()
    family = family_of(pipe.components)
    t = pipe.scheduler.timesteps[[0, 300, 999]]
    clean, noise = torch.randn((2, 3, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        family.noisy_latents(clean, noise, t), pipe.scheduler.scale_noise(clean, t, noise)
    )
    assert torch.equal(family.target(clean, noise, t), noise - clean)


def test_shapes_of_the_conditions() -> None:
    for t5 in (True, False):
        conditions = family_of(tiny_sd3(t5).components).encode_prompts(["a dog", ""])
        length = CLIP_LENGTH + MAX_SEQUENCE_LENGTH
        assert conditions["prompt_embeds"].shape == (2, length, 48)
        assert conditions["pooled_prompt_embeds"].shape == (2, 40)
        half = conditions["prompt_embeds"][:, CLIP_LENGTH:]
        assert bool(half.any()) is t5


def test_no_layer_is_cross_attention() -> None:
    assert family_of(tiny_sd3().components).cross_attention_layers() == []


def test_all_attention_projections_are_adapter_targets() -> None:
    pipe = tiny_sd3()
    targets = family_of(pipe.components).adapter_targets("transformer")
    linear = {
        name
        for name, module in pipe.transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and ".attn" in name
    }
    assert set(targets) == linear
    assert set(targets.values()) == {(32, 32)}
    # Two blocks of 8, without the last block's unused text output, and a second attention.
    assert len(targets) == 2 * 8 - 1 + 4


def test_min_snr_is_refused() -> None:
    family = family_of(tiny_sd3().components)
    t = torch.tensor([1.0, 999.0])
    assert family.loss_weight(t, None).tolist() == [1, 1]
    with pytest.raises(ConfigError, match="min-SNR"):
        family.loss_weight(t, 5.0)


def test_the_dynamic_shift_is_the_pipelines() -> None:
    pipe = tiny_sd3()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    family = family_of(pipe.components)
    small, large = (family.timesteps(torch.tensor([0.5]), (4, s, s)) for s in (16, 64))
    assert 500 < small < large
    pipe("a dog", num_inference_steps=4)
    schedule = family.schedule(4, (4, 16, 16), torch.device("cpu"))
    torch.testing.assert_close(schedule.timesteps, pipe.scheduler.timesteps)


def test_schedulers_without_a_shift_are_refused() -> None:
    family = family_of({**tiny_sd3().components, "scheduler": DDPMScheduler()})
    with pytest.raises(PipelineError, match=r"no shift.*DDPMScheduler"):
        family.timesteps(torch.tensor([0.5]), (4, 16, 16))

"""LTX-2: condensed prompts, latents normalised by channel, the audio stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from customize.api.pipeline_methods import load_custom, unload_custom
from customize.families import family_of
from customize.families.ltx2 import MAX_SEQUENCE_LENGTH
from tests.pipeline.making import assert_same, concept, everything
from tests.tiny_video import tiny_ltx2


@torch.no_grad()
def test_long_prompts_are_truncated_as_by_the_pipeline() -> None:
    pipe = tiny_ltx2()
    prompt = "  a dog " * 1000
    encoded = family_of(pipe.components).encode_prompts([prompt])
    states, mask, _, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
    expected, _, _ = pipe.connectors(states, mask, padding_side="left")
    assert encoded["prompt_embeds"].shape[1] == MAX_SEQUENCE_LENGTH
    assert torch.equal(encoded["prompt_embeds"], expected)


@torch.no_grad()
def test_latents_are_normalised_by_channel() -> None:
    pipe = tiny_ltx2()
    family = family_of(pipe.components)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = family.encode_images(pixels)
    posterior = pipe.vae.encode(pixels[:, :, None]).latent_dist
    factor = (pipe.vae.latents_mean, pipe.vae.latents_std, pipe.vae.config.scaling_factor)
    expected = pipe._normalize_latents(posterior.mean, *factor)
    assert mean.shape == std.shape == (2, 4, 16, 16)
    torch.testing.assert_close(mean, expected[:, :, 0])
    spread = pipe.vae.latents_std[:, None, None]
    torch.testing.assert_close(std, posterior.std[:, :, 0] * 0.9 / spread)
    decoded = pipe.vae.decode(posterior.mean).sample[:, :, 0].clamp(-1, 1)
    torch.testing.assert_close(family.decode_latents(mean), decoded)


@torch.no_grad()
def test_predictions_do_not_depend_on_the_audio_stream() -> None:
    pipe = tiny_ltx2()
    family = family_of(pipe.components)
    noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = noisy, torch.tensor([500.0]), family.encode_prompts(["a dog"])
    before = family.predict(*inputs)
    for name, parameter in pipe.transformer.named_parameters():
        if "audio" in name:
            parameter.mul_(-3.0)
    assert torch.equal(family.predict(*inputs), before)


def draw(pipe: Any) -> tuple[np.ndarray, torch.Tensor]:
    noise = torch.Generator().manual_seed(1)
    call = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    output = pipe("a photo of <rex>", num_frames=5, generator=noise, **call)
    return output.frames[0], output.audio


def test_a_concept_changes_every_frame_and_no_audio_layer() -> None:
    pipe = tiny_ltx2()
    bare, sound = draw(pipe)
    before = everything(pipe)
    load_custom(pipe, concept(pipe))
    changed = {name for name, part in pipe.transformer.named_modules() if hasattr(part, "lora_A")}
    assert len(changed) == 2 * 8 and not any("audio" in name for name in changed)
    attached, _ = draw(pipe)
    assert attached.shape == (5, 32, 32, 3)
    assert (np.abs(attached - bare).max(axis=(1, 2, 3)) > 1e-3).all()
    unload_custom(pipe)
    assert_same(before, everything(pipe))
    again, same_sound = draw(pipe)
    assert np.array_equal(again, bare) and torch.equal(same_sound, sound)

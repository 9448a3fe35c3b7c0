"""Qwen-Image 2.1: states before a norm, prompts of several lengths, transparency."""

from __future__ import annotations

import pytest
import torch

from customize.families import family_of
from tests.tiny_llm import tiny_qwen_image_21

SHAPE = (4, 2, 2)


@torch.no_grad()
def test_predictions_for_several_prompt_lengths_equal_single_ones() -> None:
    pipe = tiny_qwen_image_21()
    family = family_of(pipe.components)
    prompts = ["a dog", "two red cups", "a cat"]
    noisy = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([100.0, 500.0, 900.0])
    conditions = family.encode_prompts(prompts)
    lengths = conditions["prompt_lengths"]
    assert lengths[0] == lengths[2] < lengths[1] == conditions["prompt_embeds"].shape[1]
    together = family.predict(noisy, t, conditions)
    for row, prompt in enumerate(prompts):
        single = slice(row, row + 1)
        alone = family.predict(noisy[single], t[single], family.encode_prompts([prompt]))
        torch.testing.assert_close(together[single], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_hidden_states_are_read_before_the_last_norm() -> None:
    pipe = tiny_qwen_image_21()
    family = family_of(pipe.components)
    norm = pipe.text_encoder.model.language_model.norm
    before = family.encode_prompts(["a dog"])["prompt_embeds"]
    norm.weight.mul_(3.0)
    assert torch.equal(family.encode_prompts(["a dog"])["prompt_embeds"], before)
    assert not norm._forward_pre_hooks and not norm._forward_hooks
    del pipe.text_encoder.lm_head
    with pytest.raises(AttributeError):
        family.encode_prompts(["a dog"])
    assert not norm._forward_pre_hooks


@torch.no_grad()
def test_an_empty_prompt_is_encoded_as_a_space() -> None:
    family = family_of(tiny_qwen_image_21().components)
    empty, space = (family.encode_prompts([text])["prompt_embeds"] for text in ("", " "))
    assert torch.equal(empty, space)


@torch.no_grad()
def test_images_are_opaque_and_latents_normalised_by_channel() -> None:
    pipe = tiny_qwen_image_21()
    family = family_of(pipe.components)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = family.encode_images(pixels)
    opaque = torch.cat([pixels, torch.ones(2, 1, 32, 32)], dim=1)
    # The pipeline's encoding of reference images.
    expected = pipe._encode_vae_image(opaque[:, :, None], torch.Generator())
    torch.testing.assert_close(mean, expected[:, :, 0])
    posterior = pipe.vae.encode(opaque[:, :, None]).latent_dist
    spread = torch.tensor(pipe.vae.config.latents_std)[:, None, None]
    torch.testing.assert_close(std, posterior.std[:, :, 0] / spread)
    decoded = pipe.vae.decode(posterior.mean).sample[:, :3, 0]
    torch.testing.assert_close(family.decode_latents(mean), decoded)


def test_configured_sigmas_override_the_number_of_steps() -> None:
    pipe = tiny_qwen_image_21([1.0, 0.5])
    family = family_of(pipe.components, pipe.config)
    assert len(family.schedule(40, SHAPE, torch.device("cpu")).timesteps) == 2
    assert len(family_of(pipe.components).schedule(40, SHAPE, torch.device("cpu")).timesteps) == 40


def test_all_attention_projections_are_adapter_targets() -> None:
    pipe = tiny_qwen_image_21()
    targets = family_of(pipe.components).adapter_targets("transformer")
    linear = {
        name
        for name, module in pipe.transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and ".attn." in name
    }
    assert set(targets) == linear
    assert set(targets.values()) == {(32, 32)}

"""FLUX.2: the shift by steps, normalised latent patches, fused projections, two LLMs."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from customize.families import family_of
from customize.families.flux2 import MAX_SEQUENCE_LENGTH, TRAINING_STEPS, empirical_mu
from tests.tiny import tiny_flux
from tests.tiny_llm import tiny_flux2, tiny_flux2_klein

SHAPE = (16, 8, 8)


@given(st.integers(1, 20_000), st.integers(1, 400))
def test_the_shift_is_the_pipelines(tokens: int, steps: int) -> None:
    assert empirical_mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps))


@pytest.mark.parametrize("make", [tiny_flux2, tiny_flux2_klein])
def test_training_timesteps_equal_those_of_sampling_with_many_steps(make) -> None:
    family = family_of(make().components)
    drawn = family.schedule(TRAINING_STEPS, SHAPE, torch.device("cpu")).timesteps
    u = torch.linspace(1, 1 / TRAINING_STEPS, TRAINING_STEPS)
    torch.testing.assert_close(family.timesteps(u, SHAPE), drawn)
    # Few steps are shifted further towards noise.
    few = family.schedule(4, SHAPE, torch.device("cpu")).timesteps
    assert (few > family.timesteps(torch.linspace(1, 1 / 4, 4), SHAPE))[1:].all()


def test_the_shift_of_training_is_that_of_flux_1() -> None:
    u = torch.tensor([0.1, 0.5, 0.9])
    older, newer = family_of(tiny_flux().components), family_of(tiny_flux2().components)
    # A token is 2 x 2 latents in FLUX.1, and one latent in FLUX.2.
    expected = older.timesteps(u, (4, 16, 16))
    torch.testing.assert_close(newer.timesteps(u, SHAPE), expected, atol=1e-2, rtol=0)


@torch.no_grad()
def test_latents_are_patches_normalised_by_batch_norm_statistics() -> None:
    pipe = tiny_flux2()
    family = family_of(pipe.components)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = family.encode_images(pixels)
    # The pipeline's encoding of reference images.
    expected = pipe._encode_vae_image(pixels, torch.Generator())
    torch.testing.assert_close(mean, expected)
    posterior = pipe.vae.encode(pixels).latent_dist
    spread = (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt()[:, None, None]
    torch.testing.assert_close(std, functional.pixel_unshuffle(posterior.std, 2) / spread)
    decoded = pipe.vae.decode(posterior.mean).sample.clamp(-1, 1)
    torch.testing.assert_close(family.decode_latents(mean), decoded)


@pytest.mark.parametrize("make", [tiny_flux2, tiny_flux2_klein])
def test_long_prompts_are_truncated_as_by_the_pipeline(make) -> None:
    pipe = make()
    family = family_of(pipe.components)
    with torch.no_grad():
        encoded = family.encode_prompts(["dog " * 700])["prompt_embeds"]
        expected, _ = pipe.encode_prompt("dog " * 700, device="cpu")
    assert encoded.shape[1] == MAX_SEQUENCE_LENGTH
    assert torch.equal(encoded, expected)


@torch.no_grad()
def test_image_placeholders_are_removed_from_prompts() -> None:
    family = family_of(tiny_flux2().components)
    marked, plain = family.encode_prompts(["a [IMG]dog", "a dog"])["prompt_embeds"]
    assert torch.equal(marked, plain)


@torch.no_grad()
def test_only_dev_has_a_guidance_input() -> None:
    noisy = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([500.0])
    for make, reads in ((tiny_flux2, True), (tiny_flux2_klein, False)):
        family = family_of(make().components)
        conditions = family.encode_prompts(["a dog"])
        low, high = (family.predict(noisy, t, conditions, scale) for scale in (1.0, 4.0))
        assert family.has_guidance_input is reads
        assert torch.equal(low, high) is not reads


def test_distilled_models_have_no_guidance() -> None:
    for distilled in (False, True):
        pipe = tiny_flux2_klein(distilled)
        family = family_of(pipe.components, pipe.config)
        assert family.is_guided(4.0) is not distilled
        assert not family.is_guided(1.0)
    assert not family_of(tiny_flux2().components).is_guided(4.0)


def test_all_attention_projections_including_fused_ones_are_adapter_targets() -> None:
    pipe = tiny_flux2()
    targets = family_of(pipe.components).adapter_targets("transformer")
    linear = {
        name
        for name, module in pipe.transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and ".attn." in name
    }
    assert set(targets) == linear
    # Queries, keys and values of width 32, and gate and input of an MLP of 3 x 32.
    fused = "single_transformer_blocks.0.attn."
    assert targets[fused + "to_qkv_mlp_proj"] == (3 * 32 + 2 * 96, 32)
    assert targets[fused + "to_out"] == (32, 32 + 96)

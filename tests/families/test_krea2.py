"""Krea 2: configured layers of the LLM, gates, the fixed shift of the distilled model."""

from __future__ import annotations

import math

import pytest
import torch

from customize.errors import PipelineError
from customize.families import family_of
from customize.families.krea2 import MAX_SEQUENCE_LENGTH
from tests.tiny_llm import tiny_krea2

SHAPE = (4, 16, 16)


def test_a_wrong_number_of_text_encoder_layers_is_refused() -> None:
    pipe = tiny_krea2()
    family = family_of(pipe.components)  # without pipe.config: the published twelve
    with pytest.raises(PipelineError, match=r"reads 2 layers .* names 12.*pipe\.config"):
        family.encode_prompts(["a dog"])
    other = family_of(pipe.components, {"text_encoder_select_layers": (2, 3)})
    with torch.no_grad():
        encoded = family_of(pipe.components, pipe.config).encode_prompts(["a dog"])
        assert not torch.equal(
            encoded["prompt_embeds"], other.encode_prompts(["a dog"])["prompt_embeds"]
        )


def test_the_published_layers_are_the_pipelines_default() -> None:
    pipe = tiny_krea2()
    stock = type(pipe)(**pipe.components)
    pipe.transformer.register_to_config(num_text_layers=12)
    assert family_of(pipe.components)._layers() == stock.text_encoder_select_layers


@torch.no_grad()
def test_padding_does_not_change_predictions() -> None:
    pipe = tiny_krea2()
    family = family_of(pipe.components, pipe.config)
    conditions = family.encode_prompts(["a dog", "two red cups " * 300])
    embeds, mask = conditions["prompt_embeds"], conditions["prompt_embeds_mask"]
    assert mask[1].all() and mask[0].sum() < MAX_SEQUENCE_LENGTH
    noisy = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([500.0, 500.0])
    plain = family.predict(noisy, t, conditions)
    embeds[~mask] = 7.0
    torch.testing.assert_close(family.predict(noisy, t, conditions), plain)
    embeds[mask] *= 2.0
    assert not torch.allclose(family.predict(noisy, t, conditions), plain, atol=1e-3)


def test_a_distilled_model_has_one_shift_for_all_sizes() -> None:
    pipe = tiny_krea2(distilled=True)
    family = family_of(pipe.components, pipe.config)
    half = torch.tensor([0.5])
    expected = 1000 * math.exp(1.15) / (math.exp(1.15) + 1)
    for side in (16, 64):
        assert family.timesteps(half, (4, side, side)).item() == pytest.approx(expected)
    growing = family_of(pipe.components)
    assert growing.timesteps(half, (4, 16, 16)) < growing.timesteps(half, (4, 64, 64))


@torch.no_grad()
def test_latents_are_normalised_by_channel() -> None:
    pipe = tiny_krea2()
    family = family_of(pipe.components, pipe.config)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = family.encode_images(pixels)
    posterior = pipe.vae.encode(pixels[:, :, None]).latent_dist
    centre = torch.tensor(pipe.vae.config.latents_mean)[:, None, None]
    spread = torch.tensor(pipe.vae.config.latents_std)[:, None, None]
    torch.testing.assert_close(mean, (posterior.mean[:, :, 0] - centre) / spread)
    torch.testing.assert_close(std, posterior.std[:, :, 0] / spread)


def test_all_attention_projections_and_gates_are_adapter_targets() -> None:
    pipe = tiny_krea2()
    targets = family_of(pipe.components, pipe.config).adapter_targets("transformer")
    linear = {
        name
        for name, module in pipe.transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and ".attn." in name
    }
    assert set(targets) == linear
    assert targets["transformer_blocks.1.attn.to_gate"] == (32, 32)
    assert targets["transformer_blocks.1.attn.to_k"] == (16, 32)  # heads share keys
    assert targets["text_fusion.layerwise_blocks.0.attn.to_q"] == (16, 16)

"""Qwen-Image: the chat template, the video autoencoder, guidance that preserves norms."""

from __future__ import annotations

import torch

from customize.families import family_of
from customize.families.qwen_image import MAX_SEQUENCE_LENGTH
from tests.tiny import tiny_qwen_image


@torch.no_grad()
def test_encodings_do_not_depend_on_the_batch() -> None:
    family = family_of(tiny_qwen_image().components)
    short, both = family.encode_prompts(["a dog"]), family.encode_prompts(["a dog", "two red cups"])
    length = short["prompt_embeds"].shape[1]
    assert both["prompt_embeds_mask"][0].sum() == length < both["prompt_embeds"].shape[1]
    torch.testing.assert_close(
        both["prompt_embeds"][:1, :length], short["prompt_embeds"], atol=1e-5, rtol=1e-5
    )
    assert not both["prompt_embeds"][0, length:].any()


@torch.no_grad()
def test_padding_does_not_change_predictions() -> None:
    family = family_of(tiny_qwen_image().components)
    short, both = family.encode_prompts(["a dog"]), family.encode_prompts(["a dog", "two red cups"])
    noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([500.0])
    alone = family.predict(noisy, t, short)
    beside = family.predict(noisy.expand(2, -1, -1, -1), t.expand(2), both)[:1]
    torch.testing.assert_close(alone, beside, atol=1e-5, rtol=1e-5)


def test_long_prompts_are_truncated_as_by_the_pipeline() -> None:
    family = family_of(tiny_qwen_image().components)
    rows = family.encode_prompts(["dog " * 700])["prompt_embeds"]
    assert rows.shape[1] == MAX_SEQUENCE_LENGTH


@torch.no_grad()
def test_latents_are_normalised_by_channel() -> None:
    pipe = tiny_qwen_image()
    family = family_of(pipe.components)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = family.encode_images(pixels)
    posterior = pipe.vae.encode(pixels[:, :, None]).latent_dist
    centre = torch.tensor(pipe.vae.config.latents_mean)[:, None, None]
    spread = torch.tensor(pipe.vae.config.latents_std)[:, None, None]
    assert mean.shape == std.shape == (2, 4, 16, 16)
    torch.testing.assert_close(mean, (posterior.mean[:, :, 0] - centre) / spread)
    torch.testing.assert_close(std, posterior.std[:, :, 0] / spread)
    expected = pipe.vae.decode(posterior.mean).sample[:, :, 0].clamp(-1, 1)
    torch.testing.assert_close(family.decode_latents(mean), expected)


def test_guidance_preserves_the_norm_of_every_token() -> None:
    family = family_of(tiny_qwen_image().components)
    unconditional, conditional = torch.randn(
        2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0)
    )
    guided = family.apply_guidance(unconditional, conditional, 4.0)
    lengths = [family.pack(x).norm(dim=-1) for x in (guided, conditional)]
    torch.testing.assert_close(*lengths)
    towards = torch.nn.functional.cosine_similarity(
        family.pack(guided), family.pack(conditional + 3 * (conditional - unconditional)), dim=-1
    )
    torch.testing.assert_close(towards, torch.ones_like(towards))

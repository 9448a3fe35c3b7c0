"""Wan's own: prompts are cleaned and cut, autoencoders of videos, videos of many frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from customize.families import family_of
from customize.families.wan import MAX_SEQUENCE_LENGTH
from customize.hosts.binding import load_custom, unload_custom
from tests.hosts.making import concept
from tests.tiny_video import tiny_wan


def test_prompts_are_cleaned_and_cut_as_by_the_pipeline() -> None:
    pipe = tiny_wan()
    prompts = ["  a   red &amp;amp;\ncup ", "dog " * 700]
    found = family_of(pipe.components).encode_prompts(prompts)["prompt_embeds"]
    expected, _ = pipe.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE_LENGTH
    )
    assert found.shape[1] == MAX_SEQUENCE_LENGTH
    assert torch.equal(found, expected)
    assert found[1].abs().sum(-1).all() and not found[0, 100:].any()


def residual_vae() -> AutoencoderKLWan:
    """As Wan 2.2 5B has it: pixels are packed 2 x 2 before the first layer."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        vae = AutoencoderKLWan(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[0.5, 0.6, 0.7, 0.8],
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=4,
        )
    return vae.eval()


@torch.no_grad()
@pytest.mark.parametrize(("residual", "factor"), [(False, 2), (True, 4)])
def test_latents_are_those_of_the_first_frame_normalised_by_channel(
    residual: bool, factor: int
) -> None:
    vae = residual_vae() if residual else tiny_wan().vae
    family = family_of({**tiny_wan().components, "vae": vae})
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = family.encode_images(pixels)
    posterior = vae.encode(pixels[:, :, None]).latent_dist

    def by_channel(values: list[float]) -> Tensor:
        return torch.tensor(values)[:, None, None]

    centre, spread = by_channel(vae.config.latents_mean), by_channel(vae.config.latents_std)
    assert mean.shape == std.shape == (2, 4, 32 // factor, 32 // factor)
    torch.testing.assert_close(mean, (posterior.mean[:, :, 0] - centre) / spread)
    torch.testing.assert_close(std, posterior.std[:, :, 0] / spread)
    expected = vae.decode(posterior.mean).sample[:, :, 0]
    torch.testing.assert_close(family.decode_latents(mean), expected)


def video(pipe: Any) -> np.ndarray:
    noise = torch.Generator().manual_seed(1)
    call = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    return pipe("a photo of <rex>", num_frames=5, generator=noise, **call).frames[0]


def test_a_concept_is_in_every_frame_of_a_video() -> None:
    pipe = tiny_wan()
    bare = video(pipe)
    load_custom(pipe, concept(pipe))
    attached = video(pipe)
    assert attached.shape == (5, 32, 32, 3)
    assert (np.abs(attached - bare).max(axis=(1, 2, 3)) > 1e-3).all()
    unload_custom(pipe)
    assert np.array_equal(video(pipe), bare)

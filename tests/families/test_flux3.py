"""FLUX.3: windows of text, an autoencoder that scales its patches, the distilled model."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLFlux2
from diffusers.modular_pipelines.flux3.decoders import Flux3DecodeStep
from diffusers.modular_pipelines.flux3.encoders import Flux3VaeEncoderStep

from customize.errors import PipelineError
from customize.families import family_of
from customize.families.flux3 import MAX_SEQUENCE_LENGTH, Flux3
from tests.tiny import tiny_flux3

LONG = "two red cups " * 30


@torch.no_grad()
def test_encodings_do_not_depend_on_the_batch() -> None:
    family = family_of(tiny_flux3().components)
    short, both = family.encode_prompts(["a dog"]), family.encode_prompts(["a dog", LONG])
    assert short["prompt_lengths"].tolist() == [80]
    assert both["prompt_lengths"].tolist() == [80, 160]
    assert torch.equal(both["prompt_embeds"][:1, :80], short["prompt_embeds"])
    assert not both["prompt_embeds"][0, 80:].any()


@torch.no_grad()
def test_predictions_for_several_prompt_lengths_equal_single_ones() -> None:
    family = family_of(tiny_flux3().components)
    prompts = ["a dog", LONG, "a cat"]
    noisy = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([500.0, 100.0, 900.0])
    together = family.predict(noisy, t, family.encode_prompts(prompts))
    for index, prompt in enumerate(prompts):
        rows = slice(index, index + 1)
        alone = family.predict(noisy[rows], t[rows], family.encode_prompts([prompt]))
        torch.testing.assert_close(together[rows], alone, atol=1e-5, rtol=1e-5)


def test_long_prompts_are_truncated_as_by_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_flux3()
    step = pipe.blocks.sub_blocks["text_encoder"].init_pipeline()
    step.update_components(text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
    assert step.default_call_parameters["max_sequence_length"] == MAX_SEQUENCE_LENGTH
    # A lower limit, because the LLM is slow at 8192 tokens.
    monkeypatch.setattr("customize.families.flux3.MAX_SEQUENCE_LENGTH", 100)
    expected = step(prompt=LONG, max_sequence_length=100, output="prompt_embeds")
    encoded = family_of(pipe.components).encode_prompts([LONG])
    assert encoded["prompt_lengths"].tolist() == [100]
    assert torch.equal(encoded["prompt_embeds"], expected)


@torch.no_grad()
def test_latents_are_normalised_patches_as_in_the_pipeline() -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        vae = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            latent_channels=3,
            norm_num_groups=4,
            mid_block_add_attention=False,
        ).eval()
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.2, 2.0)
    family = Flux3({"vae": vae})
    pixels = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = family.encode_images(pixels)
    assert mean.shape == std.shape == (1, 12, 8, 12)
    encode = Flux3VaeEncoderStep().init_pipeline()
    encode.update_components(vae=vae)
    expected = encode(condition_images=[pixels], output="image_cond_latents")[0]
    torch.testing.assert_close(mean, expected)
    decode = Flux3DecodeStep().init_pipeline()
    decode.update_components(vae=vae)
    pictures = decode(latents=mean, output_type="pt", output="images")
    torch.testing.assert_close(family.decode_latents(mean), 2 * pictures - 1, atol=1e-5, rtol=0)
    # A sample is the posterior's sample, normalised.
    posterior = vae.encode(pixels).latent_dist
    noise = torch.randn(std.shape, generator=torch.Generator().manual_seed(1))
    encode.vae.encode = lambda _: _Encoded(posterior.mean + posterior.std * _unpatched(noise))
    drawn = encode(condition_images=[pixels], output="image_cond_latents")[0]
    torch.testing.assert_close(mean + std * noise, drawn)


def test_the_distilled_model_supports_concepts_but_not_training() -> None:
    family, base = (
        family_of(tiny_flux3(flow_map=True).components),
        family_of(tiny_flux3().components),
    )
    assert family.fingerprint() == base.fingerprint()
    t = family.timesteps(torch.tensor([0.5]), (4, 16, 16))
    with pytest.raises(PipelineError, match=r"step-distilled.*Fix: train on the model"):
        family.predict(torch.zeros(1, 4, 16, 16), t, family.encode_prompts([""]))


class _Encoded:
    """An encoding with a fixed mode."""

    def __init__(self, mode: torch.Tensor) -> None:
        self.latent_dist = self
        self.mode = lambda: mode


def _unpatched(patches: torch.Tensor) -> torch.Tensor:
    return Flux3DecodeStep._unpatchify_latents(patches)

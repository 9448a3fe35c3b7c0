"""Stable Diffusion XL: pooled prompt and sizes, autoencoders, refused models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor

from customize.errors import PipelineError
from customize.families import family_of
from tests.tiny import CLIP_LENGTH, tiny_sdxl


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unet_with(**changes: Any) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(tiny_sdxl().unet.config, **changes)


def test_shapes_of_the_conditions() -> None:
    conditions = family_of(tiny_sdxl().components).encode_prompts(["a dog", ""])
    assert conditions["prompt_embeds"].shape == (2, CLIP_LENGTH, 16 + 24)
    assert conditions["pooled_prompt_embeds"].shape == (2, 24)


@torch.no_grad()
def test_sizes_are_those_of_the_pipelines_call() -> None:
    """With different height and width, so that exchanged values fail."""
    pipe = tiny_sdxl()
    family = family_of(pipe.components)
    conditions = family.encode_prompts(["a dog"])
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((args[0], args[1], kwargs["added_cond_kwargs"]["time_ids"], output[0]))

    hook = pipe.unet.register_forward_hook(note, with_kwargs=True)
    pipe("a dog", height=24, width=40, num_inference_steps=2, guidance_scale=1.0)
    hook.remove()
    # The sizes do not need the autoencoder, which may be freed.
    family.components["vae"] = None
    for noisy, t, sizes, output in calls:
        assert noisy.shape == (1, 4, 12, 20)
        assert sizes.tolist() == [[24, 40, 0, 0, 24, 40]]
        assert torch.equal(family.predict(noisy, t.expand(1), conditions), output)
    assert len(calls) == 2


@torch.no_grad()
def test_predictions_depend_on_the_pooled_prompt() -> None:
    family = family_of(tiny_sdxl().components)
    noisy, t = normal(1, 4, 16, 16), torch.tensor([500])
    conditions = family.encode_prompts(["a dog"])
    answer = family.predict(noisy, t, conditions)
    pooled = {"pooled_prompt_embeds": family.encode_prompts(["a cup"])["pooled_prompt_embeds"]}
    assert not torch.equal(family.predict(noisy, t, conditions | pooled), answer)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_target_denoises_to_the_latents_with_euler(prediction: str) -> None:
    """Euler scales samples differently from the denoiser's input."""
    pipe = tiny_sdxl()
    pipe.scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        steps_offset=1,
        timestep_spacing="leading",
    )
    family = family_of(pipe.components)
    clean, noise = normal(1, 4, 16, 16), normal(1, 4, 16, 16, seed=1)
    answered: list[Tensor] = []

    def answer(noisy: Tensor, t: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        t = t.long().expand(1)
        expected = family.noisy_latents(clean, noise, t)
        torch.testing.assert_close(noisy, expected, atol=1e-4, rtol=1e-4)
        answered.append(t)
        return (family.target(clean, noise, t),)

    pipe.unet.forward = answer
    pipe.scheduler.set_timesteps(5)
    start = pipe.scheduler.sigmas[0] * noise + clean
    latents = pipe(
        "a dog",
        num_inference_steps=5,
        guidance_scale=1.0,
        latents=start / pipe.scheduler.init_noise_sigma,
        output_type="latent",
    ).images
    assert len(answered) == 5
    torch.testing.assert_close(latents, clean, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_latents_may_be_normalised_by_channel() -> None:
    pipe = tiny_sdxl()
    plain = family_of(pipe.components).encode_images(normal(1, 3, 32, 32).clamp(-1, 1))
    mean, std = [-1.6, 1.0, 0.3, -0.1], [8.0, 5.0, 0.6, 1.0]
    pipe.vae.register_to_config(latents_mean=mean, latents_std=std)
    family = family_of(pipe.components)
    encoded = family.encode_images(normal(1, 3, 32, 32).clamp(-1, 1))
    shift, spread = torch.tensor([mean, std])[..., None, None]
    torch.testing.assert_close(encoded[0], plain[0] / spread - shift * 0.5 / spread)
    torch.testing.assert_close(encoded[1], plain[1] / spread)

    def drawn(output_type: str) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": 1, "generator": generator, "output_type": output_type}
        return pipe("a dog", **call).images

    picture = family.decode_latents(drawn("latent"))
    torch.testing.assert_close(picture, 2 * drawn("pt") - 1, atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_autoencoder_that_overflows_in_float16_computes_in_float32() -> None:
    pipe = tiny_sdxl()
    # The encoder's activations exceed the range of float16, as in the published model.
    pipe.vae.encoder.conv_in.weight.mul_(1e7)
    pipe.vae.encoder.conv_in.weight.clamp_(-6e4, 6e4)
    pipe.vae.half()
    before = {name: value.clone() for name, value in pipe.vae.state_dict().items()}
    family = family_of(pipe.components)
    pixels = normal(1, 3, 32, 32).clamp(-1, 1)
    encoded = family.encode_images(pixels)
    picture = family.decode_latents(encoded[0])
    assert pipe.vae.dtype == torch.float16
    for name, value in pipe.vae.state_dict().items():
        assert value.dtype == torch.float16 and torch.equal(value, before[name])

    pipe.vae.register_to_config(force_upcast=False)
    assert not family.encode_images(pixels)[0].isfinite().all()
    pipe.vae.float()
    expected = family.encode_images(pixels)
    assert torch.equal(encoded[0], expected[0]) and torch.equal(encoded[1], expected[1])
    assert torch.equal(picture, family.decode_latents(expected[0]))


def test_errors_restore_the_autoencoders_dtype() -> None:
    pipe = tiny_sdxl()
    pipe.vae.half()
    with pytest.raises(RuntimeError):
        family_of(pipe.components).encode_images(torch.zeros(1, 5, 32, 32))
    assert pipe.vae.dtype == torch.float16


def test_cross_attention_layers_are_in_execution_order() -> None:
    layers = family_of(tiny_sdxl().components).cross_attention_layers()
    blocks = ["down_blocks.1"] * 2 + ["mid_block.attentions"] * 2 + ["up_blocks.0"] * 4
    assert [".".join(name.split(".")[:2]) for name in layers] == blocks
    assert all(name.endswith("attn2") for name in layers)


def test_v_prediction_loss_is_weighted_by_snr() -> None:
    family = family_of(tiny_sdxl("v_prediction").components)
    t = torch.tensor([10, 999])
    assert family.loss_weight(t, None).tolist() == [1, 1]
    assert family.loss_weight(t, 5.0)[-1] == 0, "the schedule ends in zero signal"


def test_the_refiner_is_refused_by_name() -> None:
    components = tiny_sdxl().components
    refiner = unet_with(cross_attention_dim=24, projection_class_embeddings_input_dim=5 * 8 + 24)
    for freed in ({}, {"text_encoder_2": None}):
        with pytest.raises(PipelineError, match=r"refiner of Stable Diffusion XL.*base model"):
            family_of({**components, "unet": refiner, "text_encoder": None, **freed})


def test_freed_encoders_are_not_mistaken_for_a_refiner() -> None:
    freed = {"text_encoder": None, "text_encoder_2": None, "vae": None}
    assert family_of({**tiny_sdxl().components, **freed}).name == "sdxl"


def test_inpainting_models_are_refused_without_their_channels() -> None:
    pipe = tiny_sdxl()
    family = family_of({**pipe.components, "unet": unet_with(in_channels=9)})
    conditions = family.encode_prompts([""])
    with pytest.raises(PipelineError, match=r"takes 9 channels.*not a variant for inpainting"):
        family.predict(normal(1, 4, 16, 16), torch.tensor([5]), conditions)
    # Its concepts are compatible.
    assert family.fingerprint() == family_of(pipe.components).fingerprint()


@pytest.mark.parametrize(
    "changes",
    [
        {"text_encoder": torch.nn.Linear(1, 1)},
        {"text_encoder_2": torch.nn.Linear(1, 1)},
        # Kolors
        {"unet": unet_with(encoder_hid_dim_type="text_proj", encoder_hid_dim=8)},
    ],
)
def test_other_models_with_the_same_unet_class_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PipelineError, match="no known model family"):
        family_of({**tiny_sdxl().components, **changes})


def test_edm_schedulers_are_refused() -> None:
    """Playground 2.5 has such a scheduler."""
    pipe = tiny_sdxl()
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(PipelineError, match=r"no alphas_cumprod.*EDMEulerScheduler"):
        family_of(pipe.components).timesteps(torch.tensor([0.5]), (4, 16, 16))

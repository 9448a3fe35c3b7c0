"""Stable Diffusion: DDPM timesteps, min-SNR, cross-attention layers, refused models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from torch import Tensor

from customize.core.objectives import snr
from customize.errors import PipelineError
from customize.families import family_of
from customize.families.sd import StableDiffusion
from tests.tiny import tiny_sd


def sd(pipe: Any) -> StableDiffusion:
    family = family_of(pipe.components)
    assert isinstance(family, StableDiffusion)
    return family


def test_timesteps_are_uniform() -> None:
    family = sd(tiny_sd())
    t = family.timesteps((torch.arange(4000) + 0.5) / 4000, (4, 16, 16))
    assert t.dtype == torch.int64
    assert torch.equal(t.bincount(), torch.full((1000,), 4))
    ends = torch.tensor([torch.finfo(torch.float32).eps, 1 - torch.finfo(torch.float32).eps])
    assert family.timesteps(ends, (4, 16, 16)).tolist() == [0, 999]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noise_and_target_are_those_of_the_ddpm_scheduler(prediction: str) -> None:
    pipe = tiny_sd()
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    family = sd(pipe)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn((2, 5, 4, 8, 8), generator=generator)
    t = torch.tensor([0, 1, 400, 998, 999])
    torch.testing.assert_close(
        family.noisy_latents(clean, noise, t), pipe.scheduler.add_noise(clean, noise, t)
    )
    expected = {
        "epsilon": noise,
        "v_prediction": pipe.scheduler.get_velocity(clean, noise, t),
        "sample": clean,
    }[prediction]
    torch.testing.assert_close(family.target(clean, noise, t), expected)


def test_any_ddpm_scheduler_is_supported() -> None:
    pipe = tiny_sd()
    before = sd(pipe)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    after = sd(pipe)
    clean, noise, t = torch.ones(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), torch.tensor([700])
    torch.testing.assert_close(
        after.noisy_latents(clean, noise, t), before.noisy_latents(clean, noise, t)
    )


def test_loss_weights() -> None:
    t = torch.tensor([10, 500, 999])
    for prediction in ("epsilon", "v_prediction"):
        pipe = tiny_sd(prediction)
        family = sd(pipe)
        assert family.loss_weight(t, None).tolist() == [1, 1, 1]
        ratio = snr(pipe.scheduler.alphas_cumprod, t)
        clipped = ratio.clamp(max=5.0)
        weight = family.loss_weight(t, 5.0)
        if prediction == "epsilon":
            torch.testing.assert_close(weight, clipped / ratio)
        else:
            torch.testing.assert_close(weight, clipped / (ratio + 1))
            assert weight[-1] == 0, "the schedule ends in zero signal"


def test_cross_attention_layers_are_in_execution_order() -> None:
    pipe = tiny_sd()
    family = sd(pipe)
    layers = family.cross_attention_layers()
    seen: list[str] = []
    for name, module in pipe.unet.named_modules():
        if name.endswith(("attn1", "attn2")):

            def note(module: Any, args: Any, kwargs: dict[str, Any], name: str = name) -> None:
                if kwargs.get("encoder_hidden_states") is not None:
                    seen.append(name)

            module.register_forward_pre_hook(note, with_kwargs=True)
    family.predict(torch.zeros(1, 4, 16, 16), torch.tensor([5]), family.encode_prompts(["a dog"]))
    assert len(layers) == 7
    assert seen == layers


def test_gradients_reach_the_prompt() -> None:
    family = sd(tiny_sd())
    conditions = {name: value.detach() for name, value in family.encode_prompts(["a"]).items()}
    embeds: Tensor = conditions["prompt_embeds"].requires_grad_()
    family.predict(torch.ones(1, 4, 16, 16), torch.tensor([5]), conditions).sum().backward()
    assert embeds.grad is not None and embeds.grad.abs().sum() > 0


def unet_with(**changes: Any) -> UNet2DConditionModel:
    pipe = tiny_sd()
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(pipe.unet.config, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        # SDXL, an upscaler, unCLIP, Kandinsky 2.2, Stable Diffusion's ancestors
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
        },
        {"num_class_embeds": 10},
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 8},
        {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 8},
    ],
)
def test_other_models_with_the_same_unet_class_are_refused(changes: dict[str, Any]) -> None:
    components = {**tiny_sd().components, "unet": unet_with(**changes)}
    with pytest.raises(PipelineError, match="UNet2DConditionModel"):
        family_of(components)


def test_the_error_names_the_additional_embeddings_of_sdxl() -> None:
    unet = unet_with(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )
    with pytest.raises(PipelineError, match="with text_time embeddings"):
        family_of({**tiny_sd().components, "unet": unet})


def test_another_text_encoder_is_refused() -> None:
    components = tiny_sd().components
    with pytest.raises(PipelineError, match="text_encoder: Linear"):
        family_of({**components, "text_encoder": torch.nn.Linear(1, 1)})
    components.pop("text_encoder")
    with pytest.raises(PipelineError):
        family_of(components)


def test_variants_with_more_input_channels_are_stable_diffusion() -> None:
    family = family_of({**tiny_sd().components, "unet": unet_with(in_channels=9)})
    assert family.fingerprint() == family_of(tiny_sd().components).fingerprint()


def test_a_loaded_ip_adapter_changes_nothing() -> None:
    pipe = tiny_sd()
    pipe.unet.config["encoder_hid_dim_type"] = "ip_image_proj"
    assert family_of(pipe.components).name == "sd"


def test_other_schedulers_are_refused_on_use() -> None:
    pipe = tiny_sd()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    family = family_of(pipe.components)
    with pytest.raises(PipelineError, match=r"no alphas_cumprod.*FlowMatchEulerDiscreteScheduler"):
        family.timesteps(torch.tensor([0.5]), (4, 16, 16))
    pipe.scheduler = DDPMScheduler(prediction_type="flow")
    with pytest.raises(PipelineError, match="prediction_type 'flow'"):
        _ = sd(pipe).prediction


def test_an_autoencoder_without_a_distribution_is_refused() -> None:
    from diffusers import AutoencoderTiny

    pipe = tiny_sd()
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        upsampling_scaling_factor=2,
    )
    family = family_of({**pipe.components, "vae": vae})
    with pytest.raises(PipelineError, match="AutoencoderTiny gives no distribution"):
        family.encode_images(torch.zeros(1, 3, 32, 32))

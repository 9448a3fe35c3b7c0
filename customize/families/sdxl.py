"""Stable Diffusion XL (arXiv 2307.01952): a UNet that also reads a pooled prompt and sizes.

Two CLIP text encoders, each read before its last layer, encode the prompt; the second one's
projection is the pooled prompt. The sizes are the picture's, as in the pipeline's default call:
without cropping, with the original size equal to the target size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from customize.errors import PipelineError
from customize.families.original_layer_names import clip_text_model
from customize.families.pipeline_components import NO_CONFIG, class_name
from customize.families.tokenization import to_device, tokenize
from customize.families.unet import MOTION_UNET, UNetFamily, is_unet


class StableDiffusionXL(UNetFamily):
    """Stable Diffusion XL.

    Components: UNet2DConditionModel with "text_time" embeddings, CLIPTextModel,
    CLIPTextModelWithProjection, AutoencoderKL, and any scheduler of the DDPM kind.

    Raises:
        PipelineError: The UNet is the refiner's.
    """

    name = "sdxl"
    default_guidance = 5.0
    clip_encoders: ClassVar[dict[str, str]] = {
        "text_encoder": "tokenizer",
        "text_encoder_2": "tokenizer_2",
    }

    def __init__(
        self, components: Mapping[str, Any], pipeline_config: Mapping[str, Any] = NO_CONFIG
    ) -> None:
        super().__init__(components, pipeline_config)
        # Stored, because the autoencoder may be freed before the sizes are needed. Without an
        # autoencoder the pipeline uses 8.
        self._pixels_per_latent = 8 if self.components.get("vae") is None else self._vae_factor
        unet = self.components.get("unet")
        if unet is not None and _is_refiner(unet.config):
            raise PipelineError(
                "this is the refiner of Stable Diffusion XL, which reads only one text encoder",
                where="unet",
                fix="use the base model; the refiner can follow it as it is",
            )

    @classmethod
    def matches(cls, components: Mapping[str, Any]) -> bool:
        return (
            is_unet(components.get("unet"), addition_embed_type="text_time")
            and class_name(components["unet"]) != MOTION_UNET
            and "text_encoder" in components
            and "text_encoder_2" in components
            and class_name(components["text_encoder"]) in ("CLIPTextModel", "None")
            and class_name(components["text_encoder_2"]) in ("CLIPTextModelWithProjection", "None")
        )

    @classmethod
    def published_models(cls) -> list[dict[str, nn.Module]]:
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        return [
            {
                "unet": unet,
                "text_encoder": clip_text_model(768, 12),
                "text_encoder_2": clip_text_model(1280, 32, projected=True),
            }
        ]

    def kohya_metadata(self) -> dict[str, str]:
        return {
            "ss_network_module": "networks.lora",
            "ss_base_model_version": "sdxl_base_v1-0",
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
            "modelspec.resolution": "1024x1024",
        }

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        outputs = [self._encode(prompts, key) for key in self.clip_encoders]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return {
            "prompt_embeds": hidden.to(self._component("text_encoder_2").dtype),
            "pooled_prompt_embeds": outputs[-1].text_embeds,
        }

    def predict(
        self,
        noisy: Tensor,
        t: Tensor,
        conditions: Mapping[str, Tensor],
        guidance: float = 1.0,
    ) -> Tensor:
        self._check_channels(noisy)
        dtype = self._denoiser_dtype
        added = {
            "text_embeds": conditions["pooled_prompt_embeds"].to(dtype),
            "time_ids": self._sizes(noisy).to(dtype),
        }
        return self.denoiser(
            noisy.to(dtype),
            t,
            conditions["prompt_embeds"].to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def denoiser_kwargs(self, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        added = {"text_embeds": conditions["pooled_prompt_embeds"]}
        return super().denoiser_kwargs(conditions) | {"added_cond_kwargs": added}

    def unconditional(self, empty: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # As in training; the pipeline's setting is force_zeros_for_empty_prompt.
        return {name: torch.zeros_like(value) for name, value in empty.items()}

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        with self._upcast_vae():
            return super().encode_images(pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        with self._upcast_vae():
            return super().decode_latents(latents)

    def _encode(self, prompts: Sequence[str], key: str) -> Any:
        encoder, tokenizer = self._component(key), self._component(self.clip_encoders[key])
        ids = tokenize(tokenizer, prompts, tokenizer.model_max_length).input_ids
        return encoder(to_device(ids, encoder.device), output_hidden_states=True)

    def _sizes(self, latents: Tensor) -> Tensor:
        """Return (batch, 6), float32: height, width, the crop's top and left, height, width."""
        height, width = (side * self._pixels_per_latent for side in latents.shape[-2:])
        # Filled in place: creating a tensor from a list would synchronize with the GPU.
        sizes = torch.zeros(len(latents), 6, device=latents.device)
        sizes[:, 0::4], sizes[:, 1::4] = height, width
        return sizes

    def _latent_scaling(self) -> tuple[float | Tensor, float | Tensor]:
        config = self.vae.config
        # Some autoencoders of this family have a mean and standard deviation for each channel.
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return 0.0, config.scaling_factor
        shift, spread = torch.tensor([mean, std], device=self.vae.device)[..., None, None]
        return shift, config.scaling_factor / spread

    @contextmanager
    def _upcast_vae(self) -> Iterator[None]:
        """Upcast an autoencoder that overflows in float16 to float32, as the pipeline does.

        Its weights are restored bit for bit at the end.
        """
        vae = self.vae
        if vae.dtype != torch.float16 or not vae.config.force_upcast:
            yield
            return
        vae.to(torch.float32)
        try:
            yield
        finally:
            vae.to(torch.float16)


def _is_refiner(config: Any) -> bool:
    """Whether it reads one text encoder, and five size embeddings instead of six."""
    numbers = 5 * config.addition_time_embed_dim
    return config.cross_attention_dim + numbers == config.projection_class_embeddings_input_dim

"""Stable Diffusion 1.x and 2.x: a UNet with cross-attention to one CLIP text encoder.

AnimateDiff (arXiv 2307.04725) adds motion modules to the same UNet and changes nothing else. So its
models belong to this family, and their concepts are interchangeable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from customize.families.original_layer_names import clip_text_model
from customize.families.pipeline_components import NO_CONFIG, class_name
from customize.families.tokenization import to_device, tokenize
from customize.families.unet import MOTION_UNET, UNetFamily, is_unet


class StableDiffusion(UNetFamily):
    """Stable Diffusion 1.x and 2.x.

    Components: UNet2DConditionModel or UNetMotionModel, one CLIPTextModel, AutoencoderKL, and any
    scheduler of the DDPM kind.
    """

    name = "sd"
    default_guidance = 7.5
    kohya_uses_original_names = False
    clip_encoders: ClassVar[dict[str, str]] = {"text_encoder": "tokenizer"}

    def __init__(
        self, components: Mapping[str, Any], pipeline_config: Mapping[str, Any] = NO_CONFIG
    ) -> None:
        super().__init__(components, pipeline_config)
        if class_name(self.components.get("unet")) == MOTION_UNET:
            self.output = "frames"

    @classmethod
    def matches(cls, components: Mapping[str, Any]) -> bool:
        return (
            is_unet(components.get("unet"), addition_embed_type=None)
            and "text_encoder" in components
            and class_name(components["text_encoder"]) in ("CLIPTextModel", "None")
        )

    @classmethod
    def published_models(cls) -> list[dict[str, nn.Module]]:
        from diffusers import UNet2DConditionModel

        first = UNet2DConditionModel(cross_attention_dim=768)
        second = UNet2DConditionModel(cross_attention_dim=1024, use_linear_projection=True)
        return [
            {"unet": first, "text_encoder": clip_text_model(768, 12)},
            {"unet": second, "text_encoder": clip_text_model(1024, 23)},
        ]

    def kohya_metadata(self) -> dict[str, str]:
        second = self.denoiser.config.cross_attention_dim == 1024
        v_prediction = self.components.get("scheduler") is not None and self.prediction != "epsilon"
        return {
            "ss_network_module": "networks.lora",
            "ss_v2": str(second),
            "ss_base_model_version": f"sd_v{2 if second else 1}" + ("_v" if v_prediction else ""),
            "modelspec.architecture": (
                f"stable-diffusion-v2-{'768-v' if v_prediction else '512'}"
                if second
                else "stable-diffusion-v1"
            )
            + "/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.resolution": "768x768" if second and v_prediction else "512x512",
        }

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        tokenizer, encoder = self._component("tokenizer"), self._component("text_encoder")
        tokens = tokenize(tokenizer, prompts, tokenizer.model_max_length)
        # Models without use_attention_mask in their configuration were trained on unmasked padding.
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = to_device(tokens.attention_mask, encoder.device) if masked else None
        hidden = encoder(to_device(tokens.input_ids, encoder.device), attention_mask=mask)[0]
        return {"prompt_embeds": hidden.to(encoder.dtype)}

    def predict(
        self,
        noisy: Tensor,
        t: Tensor,
        conditions: Mapping[str, Tensor],
        guidance: float = 1.0,
    ) -> Tensor:
        self._check_channels(noisy)
        dtype = self._denoiser_dtype
        prompt_embeds = conditions["prompt_embeds"].to(dtype)
        packed = self.pack(noisy.to(dtype))
        answer = self.denoiser(packed, t, prompt_embeds, return_dict=False)[0]
        return self.unpack(answer, *noisy.shape[-2:])

    def pack(self, latents: Tensor) -> Tensor:
        """Add a frame axis for motion modules: (batch, channels, 1, height, width)."""
        return latents[:, :, None] if self.output == "frames" else latents

    def unpack(self, packed: Tensor, height: int, width: int) -> Tensor:
        return packed[:, :, 0] if self.output == "frames" else packed

    @property
    def _architecture(self) -> str:
        return "UNet2DConditionModel"  # also with motion modules

    def _latent_scaling(self) -> tuple[float, float]:
        # The pipelines of this family ignore the autoencoder's shift.
        return 0.0, self.vae.config.scaling_factor

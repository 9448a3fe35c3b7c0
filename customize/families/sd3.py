"""Stable Diffusion 3 and 3.5: a multimodal transformer with rectified flow (arXiv 2403.03206).

Two CLIP text encoders with projections encode half of the prompt's tokens and the pooled condition;
T5, which is optional, encodes the other half.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from customize.families.original_layer_names import RowRange, clip_text_model, original_rows
from customize.families.pipeline_components import class_name
from customize.families.rectified_flow import RectifiedFlowFamily
from customize.families.token_layout import PromptText
from customize.families.tokenization import to_device, tokenize

#: How many T5 tokens the pipeline takes by default.
MAX_SEQUENCE_LENGTH = 256


_BLOCK = "transformer_blocks.{}"
_ORIGINALS: dict[str, tuple[str, ...]] = {
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "joint_blocks.{}.x_block.adaLN_modulation.1": (f"{_BLOCK}.norm1.linear",),
    "joint_blocks.{}.x_block.attn.qkv": tuple(f"{_BLOCK}.attn.to_{x}" for x in "qkv"),
    "joint_blocks.{}.x_block.attn.proj": (f"{_BLOCK}.attn.to_out.0",),
    "joint_blocks.{}.x_block.attn2.qkv": tuple(f"{_BLOCK}.attn2.to_{x}" for x in "qkv"),
    "joint_blocks.{}.x_block.attn2.proj": (f"{_BLOCK}.attn2.to_out.0",),
    "joint_blocks.{}.x_block.mlp.fc1": (f"{_BLOCK}.ff.net.0.proj",),
    "joint_blocks.{}.x_block.mlp.fc2": (f"{_BLOCK}.ff.net.2",),
    "joint_blocks.{}.context_block.adaLN_modulation.1": (f"{_BLOCK}.norm1_context.linear",),
    "joint_blocks.{}.context_block.attn.qkv": tuple(f"{_BLOCK}.attn.add_{x}_proj" for x in "qkv"),
    "joint_blocks.{}.context_block.attn.proj": (f"{_BLOCK}.attn.to_add_out",),
    "joint_blocks.{}.context_block.mlp.fc1": (f"{_BLOCK}.ff_context.net.0.proj",),
    "joint_blocks.{}.context_block.mlp.fc2": (f"{_BLOCK}.ff_context.net.2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}


class StableDiffusion3(RectifiedFlowFamily):
    """Stable Diffusion 3 and 3.5.

    Components: SD3Transformer2DModel, two CLIPTextModelWithProjection, T5 or None, AutoencoderKL,
    and a flow-matching scheduler.
    """

    name = "sd3"
    default_guidance = 7.0
    # attn2 is the picture's second attention in the first blocks of SD3.5-medium.
    attention_projections = re.compile(
        r"transformer_blocks\.\d+\.attn2?\."
        r"(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    )
    clip_encoders: ClassVar[dict[str, str]] = {
        "text_encoder": "tokenizer",
        "text_encoder_2": "tokenizer_2",
    }
    other_encoders = ("text_encoder_3",)
    has_clip_rows = True
    token_kinds: ClassVar = {
        r"transformer_blocks\.\d+\.attn\.(add_(q|k|v)_proj|to_add_out)": "text",
        r"transformer_blocks\.\d+\.ff_context\..+|context_embedder": "text",
        r"transformer_blocks\.\d+\.(attn2?|ff)\..+|pos_embed\.proj|proj_out": "picture",
    }
    text_attention_kinds: ClassVar = {r"transformer_blocks\.\d+\.attn": ("to_q", "add_k_proj")}

    @classmethod
    def matches(cls, components: Mapping[str, Any]) -> bool:
        return class_name(components.get("transformer")) == "SD3Transformer2DModel"

    @classmethod
    def published_models(cls) -> list[dict[str, nn.Module]]:
        from diffusers import SD3Transformer2DModel

        models = []
        for heads, dual in ((24, ()), (24, tuple(range(13))), (38, ())):
            transformer = SD3Transformer2DModel(
                num_layers=heads,
                num_attention_heads=heads,
                attention_head_dim=64,
                caption_projection_dim=64 * heads,
                joint_attention_dim=4096,
                pooled_projection_dim=2048,
                dual_attention_layers=dual,
            )
            clips = clip_text_model(768, 12, True), clip_text_model(1280, 32, True)
            texts = dict(zip(cls.clip_encoders, clips, strict=True))
            models.append({"transformer": transformer, **texts})
        return models

    def original_names(self) -> dict[str, tuple[RowRange, ...]]:
        # The original's last modulations, those with two outputs per input and not six or nine,
        # return (shift, scale), those of diffusers (scale, shift).
        layers = self.layers(self.denoiser_key)
        return original_rows(
            layers,
            _ORIGINALS,
            lambda name, shape: (
                name.endswith(("norm_out.linear", "norm1_context.linear"))
                and shape[0] == 2 * shape[1]
            ),
        )

    def kohya_metadata(self) -> dict[str, str]:
        size = {(24, 1536): "m", (38, 2432): "5-large"}
        config = self.denoiser.config
        key = (config.num_layers, config.num_attention_heads * config.attention_head_dim)
        kind = "5-medium" if config.dual_attention_layers else size.get(key)
        return {
            "ss_network_module": "networks.lora_sd3",
            "ss_base_model_version": "sd3",
            "modelspec.architecture": f"stable-diffusion-3{f'-{kind}' if kind else ''}/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.resolution": "1024x1024",
        }

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        conditions = self.encode_clip_prompts(prompts)
        clip = conditions["prompt_embeds"]
        t5 = self._encode_t5(prompts, clip)
        return conditions | {"prompt_embeds": torch.cat([clip, t5], dim=-2)}

    def encode_clip_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        clips = [self._encode_clip(prompts, key) for key in self.clip_encoders]
        clip = torch.cat([hidden for hidden, _ in clips], dim=-1)
        # CLIP's tokens come first, padded with zeros to T5's width.
        width = self.denoiser.config.joint_attention_dim
        return {
            "prompt_embeds": functional.pad(clip, (0, width - clip.shape[-1])),
            "pooled_prompt_embeds": torch.cat([pooled for _, pooled in clips], dim=-1),
        }

    def predict(
        self,
        noisy: Tensor,
        t: Tensor,
        conditions: Mapping[str, Tensor],
        guidance: float = 1.0,
    ) -> Tensor:
        self._check_channels(noisy)
        transformer = self.denoiser
        dtype = self._denoiser_dtype
        return transformer(
            hidden_states=noisy.to(dtype),
            timestep=t,
            encoder_hidden_states=conditions["prompt_embeds"].to(dtype),
            pooled_projections=conditions["pooled_prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]

    def denoiser_kwargs(self, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        pooled = conditions["pooled_prompt_embeds"]
        return super().denoiser_kwargs(conditions) | {"pooled_projections": pooled}

    @property
    def latent_multiple(self) -> int:
        return self._vae_factor * self.denoiser.config.patch_size

    def schedule(self, steps: int, shape: Sequence[int], device: torch.device) -> Any:
        # Unlike later pipelines, this one leaves the spacing of noise levels to the scheduler.
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        extra = {"mu": self._mu(shape, steps)} if self._is_dynamic else {}
        scheduler.set_timesteps(steps, device=device, **extra)
        return scheduler

    @property
    def token_size(self) -> int:  # type: ignore[override]
        return self.denoiser.config.patch_size

    def prompt_text(self, prompt: str) -> PromptText | None:
        if self.components.get("text_encoder_3") is None:
            return None
        first = self._component("tokenizer").model_max_length
        rows = first + self._length(MAX_SEQUENCE_LENGTH)
        return PromptText(self._component("tokenizer_3"), prompt, first, rows)

    def _encode_clip(self, prompts: Sequence[str], key: str) -> tuple[Tensor, Tensor]:
        """Return (batch, length, width) before the last layer, and (batch, width) projections."""
        encoder, tokenizer = self._component(key), self._component(self.clip_encoders[key])
        # Both CLIP encoders use the first tokenizer's length.
        length = self._component("tokenizer").model_max_length
        ids = to_device(tokenize(tokenizer, prompts, length).input_ids, encoder.device)
        output = encoder(ids, output_hidden_states=True)
        return output.hidden_states[-2].to(
            self._component("text_encoder").dtype
        ), output.text_embeds

    def _encode_t5(self, prompts: Sequence[str], like: Tensor) -> Tensor:
        """Return (batch, MAX_SEQUENCE_LENGTH, joint width): zeros in like's dtype without T5."""
        encoder = self.components.get("text_encoder_3")
        if encoder is None:
            width = self.denoiser.config.joint_attention_dim
            return like.new_zeros(len(prompts), self._length(MAX_SEQUENCE_LENGTH), width)
        tokens = tokenize(
            self._component("tokenizer_3"), prompts, self._length(MAX_SEQUENCE_LENGTH)
        )
        hidden = encoder(to_device(tokens.input_ids, encoder.device))[0]
        return hidden.to(like.device, encoder.dtype)

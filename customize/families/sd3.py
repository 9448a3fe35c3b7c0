"""Stable Diffusion 3 and 3.5: a multimodal transformer with rectified flow (arXiv 2403.03206).

Two CLIP text encoders with projections give half of the prompt and the pooled condition, T5, which
may be left out, the other half.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from customize.families.components import class_name
from customize.families.flow import FlowFamily
from customize.families.prompts import sent, tokenize

#: How many T5 tokens the pipeline takes by default.
MAX_SEQUENCE_LENGTH = 256


class StableDiffusion3(FlowFamily):
    """SD3Transformer2DModel, two CLIPTextModelWithProjection, T5 or None, AutoencoderKL, and a
    flow-matching scheduler."""

    name = "sd3"
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

    @classmethod
    def matches(cls, components: Mapping[str, Any]) -> bool:
        return class_name(components.get("transformer")) == "SD3Transformer2DModel"

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        clips = [self._encode_clip(prompts, key) for key in self.clip_encoders]
        clip = torch.cat([hidden for hidden, _ in clips], dim=-1)
        t5 = self._encode_t5(prompts, clip)
        # CLIP's tokens are narrower than T5's: zeros fill them up, and they come first.
        padded = functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {
            "prompt_embeds": torch.cat([padded, t5], dim=-2),
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

    @property
    def latent_multiple(self) -> int:
        return self._vae_factor * self.denoiser.config.patch_size

    def schedule(self, steps: int, shape: Sequence[int], device: torch.device) -> Any:
        # Unlike later pipelines, this one leaves the spacing of levels to its scheduler.
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        extra = {"mu": self._mu(shape, steps)} if self._is_dynamic else {}
        scheduler.set_timesteps(steps, device=device, **extra)
        return scheduler

    def _encode_clip(self, prompts: Sequence[str], key: str) -> tuple[Tensor, Tensor]:
        """(batch, length, width) before the last layer, and the (batch, width) projection."""
        encoder, tokenizer = self._part(key), self._part(self.clip_encoders[key])
        # Both CLIPs take the first tokenizer's length.
        length = self._part("tokenizer").model_max_length
        ids = sent(tokenize(tokenizer, prompts, length).input_ids, encoder.device)
        output = encoder(ids, output_hidden_states=True)
        return output.hidden_states[-2].to(self._part("text_encoder").dtype), output.text_embeds

    def _encode_t5(self, prompts: Sequence[str], like: Tensor) -> Tensor:
        """(batch, MAX_SEQUENCE_LENGTH, joint width); zeros in like's dtype where there is no T5."""
        encoder = self.components.get("text_encoder_3")
        if encoder is None:
            width = self.denoiser.config.joint_attention_dim
            return like.new_zeros(len(prompts), MAX_SEQUENCE_LENGTH, width)
        tokens = tokenize(self._part("tokenizer_3"), prompts, MAX_SEQUENCE_LENGTH)
        hidden = encoder(sent(tokens.input_ids, encoder.device))[0]
        return hidden.to(like.device, encoder.dtype)

"""FLUX.1 dev and schnell: a multimodal transformer on latents packed two by two.

CLIP gives only the pooled condition; T5 reads the prompt. dev has the guidance scale as an input.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from customize.families.components import class_name
from customize.families.flow import PackedFamily
from customize.families.prompts import sent, tokenize

#: How many T5 tokens the pipeline takes by default.
MAX_SEQUENCE_LENGTH = 512


class Flux(PackedFamily):
    """FluxTransformer2DModel, CLIPTextModel, T5EncoderModel, AutoencoderKL, and a flow-matching
    scheduler."""

    name = "flux"
    attention_projections = re.compile(
        r"(single_)?transformer_blocks\.\d+\.attn\."
        r"(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    )
    clip_encoders: ClassVar[dict[str, str]] = {"text_encoder": "tokenizer"}
    other_encoders = ("text_encoder_2",)

    @classmethod
    def matches(cls, components: Mapping[str, Any]) -> bool:
        return class_name(components.get("transformer")) == "FluxTransformer2DModel"

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        tokenizer, clip = self._part("tokenizer"), self._part("text_encoder")
        ids = tokenize(tokenizer, prompts, tokenizer.model_max_length).input_ids
        pooled = clip(sent(ids, clip.device)).pooler_output
        t5 = self._part("text_encoder_2")
        ids = tokenize(self._part("tokenizer_2"), prompts, MAX_SEQUENCE_LENGTH).input_ids
        hidden = t5(sent(ids, t5.device))[0]
        return {
            "prompt_embeds": hidden.to(pooled.device, t5.dtype),
            "pooled_prompt_embeds": pooled.to(clip.dtype),
        }

    def predict(
        self,
        noisy: Tensor,
        t: Tensor,
        conditions: Mapping[str, Tensor],
        guidance: float = 1.0,
    ) -> Tensor:
        self._check_channels(noisy)
        transformer, dtype = self.denoiser, self._denoiser_dtype
        height, width = noisy.shape[-2:]
        prompt = conditions["prompt_embeds"].to(dtype)
        scale = None
        if self.guidance_is_an_input:
            scale = torch.full((len(noisy),), guidance, device=noisy.device)
        answer = transformer(
            hidden_states=self.pack(noisy.to(dtype)),
            timestep=t / self._train_timesteps,
            guidance=scale,
            pooled_projections=conditions["pooled_prompt_embeds"].to(dtype),
            encoder_hidden_states=prompt,
            txt_ids=torch.zeros(prompt.shape[1], 3, device=noisy.device, dtype=dtype),
            img_ids=self._positions(noisy).to(dtype),
            return_dict=False,
        )[0]
        return self.unpack(answer, height, width)

    @property
    def guidance_is_an_input(self) -> bool:
        return bool(self.denoiser.config.guidance_embeds)

"""Wan 2.1 (arXiv 2503.20314) and 2.2: a transformer over the tokens of a video.

UMT5 reads the prompt and takes no new tokens: a trigger is a plain word of the prompt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from customize.families.base import Family, class_name, uncompiled
from customize.families.flow import FlowFamily
from customize.families.prompts import sent, tokenize
from customize.families.video import FramedFamily

#: How many tokens of the prompt the pipeline takes by default.
MAX_SEQUENCE_LENGTH = 512


class Wan(FramedFamily, FlowFamily):
    """WanTransformer3DModel, UMT5, AutoencoderKLWan, and a scheduler that knows flow matching.

    What animates a picture has projections of that besides; they are left alone, so what was
    learned on the model that draws from prompts also fits the one of its size that animates.
    """

    name = "wan"
    attention_projections = re.compile(r"blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)")
    clip_encoders: ClassVar[dict[str, str]] = {}
    other_encoders = ("text_encoder",)

    @classmethod
    def matches(cls, components: Mapping[str, Any]) -> bool:
        return class_name(components.get("transformer")) == "WanTransformer3DModel"

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        encoder = self._part("text_encoder")
        texts = [prompt_clean(prompt) for prompt in prompts]
        tokens = tokenize(self._part("tokenizer"), texts, MAX_SEQUENCE_LENGTH)
        mask = sent(tokens.attention_mask, encoder.device)
        states = encoder(sent(tokens.input_ids, encoder.device), mask).last_hidden_state
        # The denoiser has no mask: it was trained with zeros behind the prompt.
        return {"prompt_embeds": states.masked_fill(mask[..., None] == 0, 0.0).to(encoder.dtype)}

    def predict(
        self,
        noisy: Tensor,
        t: Tensor,
        conditions: Mapping[str, Tensor],
        guidance: float = 1.0,
    ) -> Tensor:
        self._check_channels(noisy)
        dtype = self._denoiser_dtype
        # Wan 2.2 5B is given a time for each token, but tokens to draw all have the same.
        answer = self.denoiser(
            hidden_states=self.pack(noisy.to(dtype)),
            timestep=t,
            encoder_hidden_states=conditions["prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]
        return self.unpack(answer, *noisy.shape[-2:])

    def pack(self, latents: Tensor) -> Tensor:
        """(batch, channels, h, w) to (batch, channels, 1, h, w)."""
        return latents[:, :, None]

    def unpack(self, packed: Tensor, height: int, width: int) -> Tensor:
        return packed[:, :, 0]

    def schedule(self, steps: int, shape: Sequence[int], device: torch.device) -> Any:
        return Family.schedule(self, steps, shape, device)  # the levels are the scheduler's own

    def cross_attention_layers(self) -> list[str]:
        names = (name for name, _ in uncompiled(self.denoiser).named_modules())
        return [name for name in names if re.fullmatch(r"blocks\.\d+\.attn2", name)]

    @property
    def default_resolution(self) -> int:
        return 480  # the pipeline's height

    @property
    def latent_multiple(self) -> int:
        # The pipeline asks for multiples of 16, and rounds to its tokens of 2 x 2 latents.
        return math.lcm(16, 2 * self._vae_factor)

    @property
    def _vae_factor(self) -> int:
        return self.vae.config.scale_factor_spatial

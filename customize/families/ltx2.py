"""LTX-2 and 2.3 (arXiv 2601.03233): a transformer with a video stream and an audio stream.

Pictures have no audio, so a concept adapts only the video stream: its self-attention and its
cross-attention to the prompt. The attention between the streams is unchanged; training and
validation disable it, or the picture would depend on an arbitrary audio input. Validation uses
classifier-free guidance only. The pipeline generates both streams together and enables further
kinds of guidance by default.

Gemma encodes the prompt, and two connectors condense the states of all its layers. They take no new
tokens: a trigger is a plain word of the prompt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from customize.families.pipeline_components import class_name, modules_named
from customize.families.rectified_flow import RectifiedFlowFamily
from customize.families.tokenization import to_device
from customize.families.video_vae import VideoVAEFamily

#: How many tokens of the prompt the pipeline takes by default.
MAX_SEQUENCE_LENGTH = 1024


class LTX2(VideoVAEFamily, RectifiedFlowFamily):
    """LTX-2 and 2.3.

    Components: LTX2VideoTransformer3DModel, a Gemma, LTX2TextConnectors, AutoencoderKLLTX2Video,
    and a flow-matching scheduler whose shift grows with the picture.
    """

    name = "ltx2"
    default_guidance = 3.0
    output = "frames"
    attention_projections = re.compile(
        r"transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
    )
    clip_encoders: ClassVar[dict[str, str]] = {}
    other_encoders = ("text_encoder", "connectors")
    attention_mask = "added"
    regions_unsupported = "the image attends to the sound, which hears the whole prompt"

    @classmethod
    def matches(cls, components: Mapping[str, Any]) -> bool:
        return class_name(components.get("transformer")) == "LTX2VideoTransformer3DModel"

    @classmethod
    def published_models(cls) -> list[dict[str, nn.Module]]:
        from diffusers import LTX2VideoTransformer3DModel

        later = {
            name: True
            for kind in ("gated_attn", "cross_attn_mod")
            for name in (kind, f"audio_{kind}")
        }
        return [
            {"transformer": LTX2VideoTransformer3DModel()},
            {"transformer": LTX2VideoTransformer3DModel(use_prompt_embeddings=False, **later)},
        ]

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As :meth:`Family.encode_prompts`, but condensed by the video stream's connector.

        The pipeline condenses after encoding; the states of all layers are about fifty times as
        large.
        """
        encoder, connectors = self._component("text_encoder"), self._component("connectors")
        tokens = self._component("tokenizer")(
            [prompt.strip() for prompt in prompts],
            padding="max_length",
            padding_side="left",
            max_length=MAX_SEQUENCE_LENGTH,
            truncation=True,
            return_tensors="pt",
        )
        mask = to_device(tokens.attention_mask, encoder.device)
        states = encoder(
            input_ids=to_device(tokens.input_ids, encoder.device),
            attention_mask=mask,
            output_hidden_states=True,
        ).hidden_states
        layers = torch.stack(states, dim=-1).flatten(2, 3).to(encoder.dtype)
        condensed, _, mask = connectors(layers, mask, padding_side="left")
        return {"prompt_embeds": condensed, "prompt_attention_mask": mask}

    def predict(
        self,
        noisy: Tensor,
        t: Tensor,
        conditions: Mapping[str, Tensor],
        guidance: float = 1.0,
    ) -> Tensor:
        self._check_channels(noisy)
        denoiser, dtype = self.denoiser, self._denoiser_dtype
        height, width = noisy.shape[-2:]
        prompts, mask = conditions["prompt_embeds"].to(dtype), conditions["prompt_attention_mask"]
        # The audio stream needs an input: the smallest possible one.
        silence = noisy.new_zeros(len(noisy), 1, denoiser.config.audio_in_channels, dtype=dtype)
        empty_prompt = prompts.new_zeros(len(noisy), 1, self._audio_prompt_width)
        answer = denoiser(
            hidden_states=self.pack(noisy.to(dtype)),
            audio_hidden_states=silence,
            encoder_hidden_states=prompts,
            audio_encoder_hidden_states=empty_prompt,
            timestep=t,
            sigma=t,
            encoder_attention_mask=mask,
            num_frames=1,
            height=height,
            width=width,
            audio_num_frames=1,
            isolate_modalities=True,
            return_dict=False,
        )[0]
        return self.unpack(answer, height, width)

    def pack(self, latents: Tensor) -> Tensor:
        """Convert (batch, channels, h, w) to tokens (batch, h * w, channels)."""
        return latents.flatten(2).transpose(1, 2)

    def unpack(self, packed: Tensor, height: int, width: int) -> Tensor:
        return packed.transpose(1, 2).unflatten(2, (height, width))

    def cross_attention_layers(self) -> list[str]:
        return modules_named(self.denoiser, r"transformer_blocks\.\d+\.attn2")

    @property
    def default_resolution(self) -> int:
        return 512  # the pipeline's height

    @property
    def latent_multiple(self) -> int:
        return math.lcm(32, self._vae_factor)  # the pipeline requires multiples of 32

    @property
    def _vae_factor(self) -> int:
        return self.vae.spatial_compression_ratio

    @property
    def _audio_prompt_width(self) -> int:
        """The width of the audio stream's prompt tokens."""
        config = self.denoiser.config
        if config.use_prompt_embeddings:
            return config.caption_channels
        return config.audio_num_attention_heads * config.audio_attention_head_dim

    def _picture_tokens(self, shape: Sequence[int]) -> int:
        return shape[-2] * shape[-1]

    def _latent_scaling(self) -> tuple[Tensor, Tensor]:
        vae = self.vae
        mean, std = (
            value.float()[:, None, None, None] for value in (vae.latents_mean, vae.latents_std)
        )
        return mean, vae.config.scaling_factor / std

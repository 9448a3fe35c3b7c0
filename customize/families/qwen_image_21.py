"""Qwen-Image 2.1: one transformer over prompt and picture, in that order, causal in the prompt.

It differs from Qwen-Image in the LLM, in unpacked latents, in an autoencoder with an alpha channel,
and in positions of the picture's tokens that depend on the prompt's length. The LLM takes no new
tokens: a trigger is a plain word of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from customize.families.native_references import NativeReferences
from customize.families.pipeline_components import class_name
from customize.families.tokenization import pad_sequences, to_device, unpad_sequences
from customize.families.video_vae import QwenImageVAEFamily

_SYSTEM = "Comprehend and analyze the provided prompt."
_TEMPLATE = (
    f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n{{}}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
_SLOT = 4  # picture tokens per position of the LLM


class QwenImage21(QwenImageVAEFamily):
    """Qwen-Image 2.1.

    Components: QwenImage21Transformer2DModel, Qwen3VLForConditionalGeneration,
    AutoencoderKLQwenImage21, and a flow-matching scheduler.
    """

    name = "qwen_image_21"
    native_references = (
        NativeReferences(
            model="Qwen-Image 2.1",
            pipelines=("QwenImage21Pipeline",),
            blocks=("qwenimage21", "qwenimage21-turbo"),
            output_size="last",
            order="`<image1>`, `<image2>`, ... before the prompt",
            size_rule="resized to the area output_resolution^2 (default 1024^2), also enlarged",
            cache="yes, unless use_kv_cache=False",
        ),
    )
    default_guidance = 1.0
    attention_projections = re.compile(r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)")
    clip_encoders: ClassVar[dict[str, str]] = {}
    other_encoders = ("text_encoder",)
    attention_mask = "boolean"
    guidance_needs_negative_prompt = True
    regions_unsupported = "the denoiser keeps what it read of the prompt from step to step"
    patch = 1

    @classmethod
    def matches(cls, components: Mapping[str, Any]) -> bool:
        return class_name(components.get("transformer")) == "QwenImage21Transformer2DModel"

    @classmethod
    def published_models(cls) -> list[dict[str, nn.Module]]:
        from diffusers import QwenImage21Transformer2DModel

        return [{"transformer": QwenImage21Transformer2DModel()}]

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As :meth:`Family.encode_prompts`, but with "prompt_lengths" instead of the mask.

        "prompt_lengths", (len(prompts),), int64, on the CPU, has the lengths of "prompt_embeds"
        without the padding zeros.
        """
        processor, encoder = self._component("processor"), self._component("text_encoder")
        tokens = processor(
            # The pipeline encodes an empty prompt as a space.
            text=[_TEMPLATE.format(prompt or " ") for prompt in prompts],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        # The last layer's output before the norm, which transformers does not return.
        language = encoder.model.language_model
        hook = language.norm.register_forward_hook(lambda _, inputs, output: inputs[0])
        try:
            states = encoder(
                **{name: to_device(values, encoder.device) for name, values in tokens.items()},
                output_hidden_states=True,
                logits_to_keep=1,
            ).hidden_states[-1]
        finally:
            hook.remove()
        rows = [
            row[self._system_tokens() :] for row in unpad_sequences(states, tokens.attention_mask)
        ]
        return {
            "prompt_embeds": pad_sequences(rows),
            "prompt_lengths": torch.tensor(list(map(len, rows))),
        }

    def predict(
        self,
        noisy: Tensor,
        t: Tensor,
        conditions: Mapping[str, Tensor],
        guidance: float = 1.0,
    ) -> Tensor:
        """As :meth:`Family.predict`, but with one call of the denoiser for each prompt length.

        Padding a prompt would shift the positions of the picture's tokens.
        """
        self._check_channels(noisy)
        dtype = self._denoiser_dtype
        height, width = noisy.shape[-2:]
        tokens, prompts = self.pack(noisy.to(dtype)), conditions["prompt_embeds"].to(dtype)
        lengths = conditions["prompt_lengths"].tolist()
        answers: dict[int, Tensor] = {}
        for length in set(lengths):
            rows = [row for row, other in enumerate(lengths) if other == length]
            # False for the prompt's tokens, true for the picture's.
            is_picture = torch.arange(length + tokens.shape[1] // _SLOT, device=noisy.device)
            answer = self.denoiser(
                hidden_states=tokens[rows],
                encoder_hidden_states=prompts[rows, :length],
                timestep=(t / self._train_timesteps)[rows],
                img_shapes=[[(1, height, width)]] * len(rows),
                img_mask=(is_picture >= length).expand(len(rows), -1),
                return_dict=False,
            )[0]
            answers |= zip(rows, answer[:, -tokens.shape[1] :], strict=True)
        return self.unpack(torch.stack([answers[row] for row in range(len(noisy))]), height, width)

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        opaque = torch.ones_like(pixels[:, :1])
        return super().encode_images(torch.cat([pixels, opaque], dim=1))

    def decode_latents(self, latents: Tensor) -> Tensor:
        return super().decode_latents(latents)[:, :3]

    @property
    def default_resolution(self) -> int:
        return 1024  # the pipeline's, independent of the autoencoder's factor

    @property
    def _decoder_width(self) -> int:
        config = self.vae.config
        return 24 * (config.decoder_base_dim or config.base_dim)

    def relevant_config(self) -> dict[str, Any]:
        sigmas = self.pipeline_config.get("sample_sigmas")
        return super().relevant_config() | ({"sample_sigmas": list(sigmas)} if sigmas else {})

    def _levels(self, steps: int) -> Any:
        # Models with their own levels ignore the number of steps.
        return self.pipeline_config.get("sample_sigmas") or super()._levels(steps)

    def _system_tokens(self) -> int:
        """Return the number of the template's tokens that encoding removes."""
        system = [{"role": "system", "content": [{"type": "text", "text": _SYSTEM}]}]
        tokens = self._component("processor").apply_chat_template(
            system, tokenize=True, return_dict=False
        )
        return len(tokens[0])

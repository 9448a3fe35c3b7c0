"""Krea 2: one transformer over the tokens of prompt and picture, and one that fuses LLM layers.

It reads twelve layers of a multimodal LLM at each token of the prompt. The LLM takes no new tokens:
a trigger is a plain word of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from customize.errors import PipelineError
from customize.families.denoiser_inputs import grid_of_positions
from customize.families.pipeline_components import class_name
from customize.families.token_layout import PromptText
from customize.families.tokenization import to_device, tokenize
from customize.families.video_vae import QwenImageVAEFamily

#: How many tokens of prompt and template the pipeline takes by default.
MAX_SEQUENCE_LENGTH = 512

_PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity,"
    " text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
_PREFIX_TOKENS = 34  # by the model's tokenizer; removed from the encoded prompt
_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
_SUFFIX_TOKENS = 5
#: Indices of the LLM's hidden states, unless the pipeline's configuration has others.
_LAYERS = tuple(range(2, 36, 3))
_DISTILLED_MU = 1.15


class Krea2(QwenImageVAEFamily):
    """Krea 2.

    Components: Krea2Transformer2DModel, Qwen3VLModel, AutoencoderKLQwenImage, and a flow-matching
    scheduler whose shift grows with the picture.
    """

    name = "krea2"
    # to_gate scales the output of an attention.
    attention_projections = re.compile(
        r"(transformer_blocks|text_fusion\.(layerwise|refiner)_blocks)\.\d+\.attn\."
        r"(to_q|to_k|to_v|to_gate|to_out\.0)"
    )
    clip_encoders: ClassVar[dict[str, str]] = {}
    other_encoders = ("text_encoder",)
    attention_mask = "boolean"
    no_guidance = 0.0
    # The layerwise blocks attend to the LLM's layers at each token by itself.
    token_kinds: ClassVar = {
        r"text_fusion\.layerwise_blocks\.\d+\.(attn|ff)\..+": "text_rows",
        r"text_fusion\.refiner_blocks\.\d+\.(attn|ff)\..+|txt_in\.linear_[12]": "text",
        r"img_in|final_layer\.linear": "picture",
        r"transformer_blocks\.\d+\.(attn|ff)\..+": "text_picture",
    }
    text_attention_kinds: ClassVar = {r"transformer_blocks\.\d+\.attn": ("to_q", "to_k")}
    text_mask_argument = "encoder_attention_mask"

    @classmethod
    def matches(cls, components: Mapping[str, Any]) -> bool:
        return class_name(components.get("transformer")) == "Krea2Transformer2DModel"

    @classmethod
    def published_models(cls) -> list[dict[str, nn.Module]]:
        from diffusers import Krea2Transformer2DModel

        return [{"transformer": Krea2Transformer2DModel()}]

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        tokenizer, encoder = self._component("tokenizer"), self._component("text_encoder")
        layers = self._layers()
        length = self._length(MAX_SEQUENCE_LENGTH) + _PREFIX_TOKENS - _SUFFIX_TOKENS
        start = tokenize(tokenizer, [_PREFIX + prompt for prompt in prompts], length)
        end = tokenizer([_SUFFIX] * len(prompts), return_tensors="pt")
        ids = torch.cat([start.input_ids, end.input_ids], dim=1)
        mask = torch.cat([start.attention_mask, end.attention_mask], dim=1).bool()
        # Padding lies before the suffix and does not count as a position.
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        mask = to_device(mask, encoder.device)
        states = encoder(
            input_ids=to_device(ids, encoder.device),
            attention_mask=mask,
            position_ids=to_device(positions, encoder.device).expand(3, -1, -1),
            output_hidden_states=True,
        ).hidden_states
        read = torch.stack([states[i][:, _PREFIX_TOKENS:] for i in layers], dim=2)
        return {"prompt_embeds": read, "prompt_embeds_mask": mask[:, _PREFIX_TOKENS:]}

    def predict(
        self,
        noisy: Tensor,
        t: Tensor,
        conditions: Mapping[str, Tensor],
        guidance: float = 1.0,
    ) -> Tensor:
        self._check_channels(noisy)
        dtype = self._denoiser_dtype
        prompt = conditions["prompt_embeds"].to(dtype)
        answer = self.denoiser(
            hidden_states=self.pack(noisy.to(dtype)),
            encoder_hidden_states=prompt,
            timestep=t / self._train_timesteps,
            # All tokens of the prompt have position 0.
            position_ids=functional.pad(self._positions(noisy), (0, 0, prompt.shape[1], 0)),
            encoder_attention_mask=conditions["prompt_embeds_mask"],
            return_dict=False,
        )[0]
        return self.unpack(answer, *noisy.shape[-2:])

    def denoiser_kwargs(self, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        mask = conditions["prompt_embeds_mask"]
        return super().denoiser_kwargs(conditions) | {"encoder_attention_mask": mask}

    def latent_grid(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        # All tokens of the prompt have position 0.
        return grid_of_positions(arguments["position_ids"])

    def prompt_text(self, prompt: str) -> PromptText:
        rows = self._length(MAX_SEQUENCE_LENGTH) - _SUFFIX_TOKENS
        return PromptText(self._component("tokenizer"), _PREFIX + prompt, -_PREFIX_TOKENS, rows)

    @property
    def default_guidance(self) -> float:  # type: ignore[override]
        # Distilled models need no guidance, unlike the default of the pipeline's call.
        return self.no_guidance if self._is_distilled else 4.5

    @property
    def default_resolution(self) -> int:
        return 1024  # the pipeline's, independent of the autoencoder's factor

    def relevant_config(self) -> dict[str, Any]:
        return super().relevant_config() | {
            "is_distilled": self._is_distilled,
            "text_encoder_select_layers": list(self._layers()),
        }

    @property
    def _is_distilled(self) -> bool:
        return bool(self.pipeline_config.get("is_distilled", False))

    def _mu(self, shape: Sequence[int], steps: int | None = None) -> float:
        return _DISTILLED_MU if self._is_distilled else super()._mu(shape, steps)

    def _layers(self) -> tuple[int, ...]:
        """The LLM's hidden states that the denoiser reads.

        Raises:
            PipelineError: Their number differs from the denoiser's.
        """
        layers = self.pipeline_config.get("text_encoder_select_layers") or _LAYERS
        takes = self.denoiser.config.num_text_layers
        if len(layers) != takes:
            raise PipelineError(
                f"the denoiser reads {takes} layers of the text encoder, and the pipeline's "
                f"configuration names {len(layers)}",
                where="text_encoder_select_layers",
                fix="give pipe.config along with pipe.components, of the model's own pipeline",
            )
        return tuple(layers)

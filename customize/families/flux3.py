"""FLUX.3: one transformer, first with a stream each for prompt and picture, then with one for both.

A multimodal LLM reads the prompt in its chat template; the condition is the concatenation of
several of its layers. The prompt is padded to a multiple of 80 tokens, and the denoiser attends to
the padding. The LLM takes no new tokens: a trigger is a plain word of the prompt.

diffusers has only a modular pipeline for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from customize.errors import PipelineError
from customize.families.denoiser_inputs import weights_per_token
from customize.families.flux2_vae import Flux2VAEFamily
from customize.families.native_references import NativeReferences
from customize.families.pipeline_components import class_name
from customize.families.rectified_flow import RectifiedFlowFamily
from customize.families.token_layout import PromptText
from customize.families.tokenization import pad_sequences, to_device

#: How many tokens of prompt and template the pipeline takes by default.
MAX_SEQUENCE_LENGTH = 8192

_WINDOW = 80  # the padded text is a multiple of this number of tokens
_LAYERS = (4, 8, 12, 16, 20, 24, 28, 32)  # of the LLM's hidden states in the condition
_POSITION = 0.5  # the distance between neighbouring picture tokens


class Flux3(Flux2VAEFamily, RectifiedFlowFamily):
    """FLUX.3.

    Components: Flux3Transformer2DModel, a Qwen3-VL with its processor, AutoencoderKLFlux2, and a
    flow-matching scheduler.

    The blocks for reference pictures only take no adapter. Concepts also fit the step-distilled
    model, but training on it is not supported.
    """

    name = "flux3"
    native_references = (
        NativeReferences(
            model="FLUX.3 klein",
            pipelines=(),
            blocks=("flux3", "flux3-distilled"),
            limit=10,  # of the step that rewrites prompts
            prompts="one prompt",
            output_size="first",
            size_rule="one: kept whole, shrunk to 4 megapixels if larger; several: shrunk to 1 "
            "megapixel if larger, up to 15 pixels of a side are cut off",
            max_pixels=1024**2,
            max_pixels_alone=4 * 1024**2,
        ),
    )
    default_guidance = 3.5
    attention_projections = re.compile(
        r"(mode_blocks\.image|txt_mode_blocks|single_transformer_blocks)\.\d+\.attn\."
        r"(to_q|to_k|to_v|to_out\.0)"
    )
    clip_encoders: ClassVar[dict[str, str]] = {}
    other_encoders = ("text_encoder",)
    modular_only = True
    token_kinds: ClassVar = {
        r"txt_mode_blocks\.\d+\.(attn|ff)\..+|context_embedder": "text",
        r"mode_blocks\.image\.\d+\.(attn|ff)\..+|x_embedders\.image|proj_out": "picture",
        r"single_transformer_blocks\.\d+\.(attn|ff)\..+": "text_picture",
    }
    text_attention_kinds: ClassVar = {r"single_transformer_blocks\.\d+\.attn": ("to_q", "to_k")}

    @classmethod
    def matches(cls, components: Mapping[str, Any]) -> bool:
        return class_name(components.get("transformer")) == "Flux3Transformer2DModel"

    @classmethod
    def published_models(cls) -> list[dict[str, nn.Module]]:
        from diffusers import Flux3Transformer2DModel

        return [{"transformer": Flux3Transformer2DModel()}]

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As :meth:`Family.encode_prompts`, but "prompt_embeds" is padded with zeros.

        "prompt_lengths", (len(prompts),), int64, on the CPU, has the lengths without them; the
        pipeline takes one prompt at a time.
        """
        rows = [self._encode(prompt) for prompt in prompts]
        lengths = torch.tensor([len(row) for row in rows])
        return {"prompt_embeds": pad_sequences(rows), "prompt_lengths": lengths}

    def predict(
        self,
        noisy: Tensor,
        t: Tensor,
        conditions: Mapping[str, Tensor],
        guidance: float = 1.0,
    ) -> Tensor:
        self._check_channels(noisy)
        if self.denoiser.config.flow_map:
            raise PipelineError(
                "this is the step-distilled FLUX.3, which is told where each step leads to and "
                "answers no plain velocity",
                where="transformer",
                fix="train on the model that it was distilled from; its concepts can be attached "
                "to this one",
            )
        dtype = self._denoiser_dtype
        height, width = noisy.shape[-2:]
        # The denoiser has no mask for shorter prompts, so each length has its own call.
        lengths = conditions["prompt_lengths"].tolist()
        rows: list[Tensor] = [noisy] * len(noisy)
        for length in set(lengths):
            indices = [index for index, other in enumerate(lengths) if other == length]
            answers = self.denoiser(
                hidden_states=noisy[indices].to(dtype).flatten(2).transpose(1, 2),
                encoder_hidden_states=conditions["prompt_embeds"][indices, :length].to(dtype),
                timestep=t[indices] / self._train_timesteps,
                img_ids=_picture_positions(height, width, noisy.device),
                txt_ids=_text_positions(length, noisy.device),
                return_dict=False,
            )[0]
            for index, answer in zip(indices, answers, strict=True):
                rows[index] = answer.transpose(0, 1).unflatten(1, (height, width))
        return torch.stack(rows)

    def denoiser_kwargs(self, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        """As the base class, for prompts of one length: the pipeline takes one prompt at a time."""
        length = int(conditions["prompt_lengths"].max())
        return super().denoiser_kwargs(
            {"prompt_embeds": conditions["prompt_embeds"][:, :length]}
        ) | {"txt_ids": _text_positions(length, conditions["prompt_embeds"].device)}

    def latent_grid(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        rows, columns = (arguments["img_ids"][:, 1:3].amax(0) / _POSITION).round().int().tolist()
        return rows + 1, columns + 1

    _max_timestep = 1.0

    def broadcast_weights(self, weights: Tensor, answer: Tensor) -> Tensor:
        return weights_per_token(weights, answer)

    @property
    def default_resolution(self) -> int:
        return 1024  # the pipeline's, independent of the autoencoder's factor

    @property
    def latent_multiple(self) -> int:
        return 2 * self._vae_factor

    def prompt_text(self, prompt: str) -> PromptText:
        text = self._in_template(prompt)
        return PromptText(
            self._component("tokenizer").tokenizer, text, 0, self._length(MAX_SEQUENCE_LENGTH)
        )

    def _in_template(self, prompt: str) -> str:
        return str(
            self._component("tokenizer").apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        )

    def _encode(self, prompt: str) -> Tensor:
        """Encode one prompt as the pipeline does: (tokens, layers * width)."""
        processor, encoder = self._component("tokenizer"), self._component("text_encoder")
        text = self._in_template(prompt)
        cut = {"truncation": True, "return_tensors": "pt"}
        tokenizer = processor.tokenizer
        length = tokenizer(
            text, max_length=self._length(MAX_SEQUENCE_LENGTH), **cut
        ).input_ids.shape[1]
        window = min(math.ceil(length / _WINDOW) * _WINDOW, self._length(MAX_SEQUENCE_LENGTH))
        tokens = tokenizer(
            text, padding="max_length", padding_side="right", max_length=window, **cut
        )
        # Explicit position ids, because transformers' default for padding depends on its version.
        positions = torch.arange(window)[None].masked_fill(tokens.attention_mask == 0, 1)
        states = encoder(
            input_ids=to_device(tokens.input_ids, encoder.device),
            attention_mask=to_device(tokens.attention_mask, encoder.device),
            position_ids=to_device(positions, encoder.device),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        return torch.cat([states[layer][0] for layer in _LAYERS], dim=-1).to(encoder.dtype)


def _picture_positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows * columns, 4): 0, scaled row and column of each token, 0."""
    grid = torch.zeros(rows, columns, 4, device=device)
    grid[..., 1] = _POSITION * torch.arange(rows, device=device)[:, None]
    grid[..., 2] = _POSITION * torch.arange(columns, device=device)
    return grid.reshape(-1, 4)


def _text_positions(length: int, device: torch.device) -> Tensor:
    """(length, 4): three zeros and the token's position in the prompt."""
    positions = torch.zeros(length, 4, device=device)
    positions[:, 3] = torch.arange(length, device=device)
    return positions

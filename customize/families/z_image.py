"""Z-Image (arXiv 2511.22699): one transformer over the tokens of prompt and picture.

An LLM reads the prompt in its chat template and takes no new tokens: a trigger is a plain word of
the prompt. The denoiser's time runs from noise to data, and it predicts ``latents - noise``;
:meth:`ZImage.predict` reverses both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from customize.errors import PipelineError
from customize.families.native_references import NativeReferences
from customize.families.original_layer_names import RowRange, original_rows
from customize.families.pipeline_components import class_name
from customize.families.rectified_flow import RectifiedFlowFamily
from customize.families.token_layout import PromptText, TokenKind
from customize.families.tokenization import pad_sequences, to_device, tokenize, unpad_sequences

#: How many tokens of prompt and template the pipeline takes by default.
MAX_SEQUENCE_LENGTH = 512

_TOKEN_MULTIPLE = 32  # the tokens of prompt and picture are padded to multiples of this number

_ORIGINALS: dict[str, tuple[str, ...]] = {
    "x_embedder": ("all_x_embedder.2-1",),
    "final_layer.linear": ("all_final_layer.2-1.linear",),
    "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
}
for _stack in ("layers.{}", "noise_refiner.{}", "context_refiner.{}"):
    _attention = f"{_stack}.attention"
    _ORIGINALS[f"{_attention}.qkv"] = tuple(f"{_attention}.to_{x}" for x in "qkv")
    _ORIGINALS[f"{_attention}.out"] = (f"{_attention}.to_out.0",)


class ZImage(RectifiedFlowFamily):
    """Z-Image.

    Components: ZImageTransformer2DModel, an LLM such as Qwen3, AutoencoderKL, and a flow-matching
    scheduler.
    """

    name = "z_image"
    native_references = (
        NativeReferences(
            model="Z-Image Omni",
            pipelines=("ZImageOmniPipeline",),
            output_size="last",
            size_rule="shrunk to 1 megapixel if larger, or to the size of the output if height and "
            "width are given; up to 15 pixels of a side are cut off",
            max_pixels=1024**2,
            min_side=64,
            max_aspect=8.0,
        ),
    )
    default_guidance = 5.0
    attention_projections = re.compile(
        r"(layers|noise_refiner|context_refiner)\.\d+\.attention\.(to_q|to_k|to_v|to_out\.0)"
    )
    clip_encoders: ClassVar[dict[str, str]] = {}
    other_encoders = ("text_encoder",)
    attention_mask = "boolean"
    latents_argument = "x"
    text_argument = "cap_feats"
    list_arguments = ("x", "cap_feats")
    no_guidance = 0.0
    # The embedders compute from all prompts or pictures of a batch behind one another.
    token_kinds: ClassVar = {
        r"context_refiner\.\d+\.(attention|feed_forward)\..+": "text",
        r"noise_refiner\.\d+\.(attention|feed_forward)\..+|all_final_layer\..+\.linear": "picture",
        r"layers\.\d+\.(attention|feed_forward)\..+": "picture_text",
    }
    text_attention_kinds: ClassVar = {r"layers\.\d+\.attention": ("to_q", "to_k")}
    token_size = 2
    pads_tokens = True

    @classmethod
    def matches(cls, components: Mapping[str, Any]) -> bool:
        return class_name(components.get("transformer")) == "ZImageTransformer2DModel"

    @classmethod
    def published_models(cls) -> list[dict[str, nn.Module]]:
        from diffusers import ZImageTransformer2DModel

        return [{"transformer": ZImageTransformer2DModel()}]

    def original_names(self) -> dict[str, tuple[RowRange, ...]]:
        return original_rows(self.layers(self.denoiser_key), _ORIGINALS)

    def kohya_metadata(self) -> dict[str, str]:
        return {
            "ss_network_module": "networks.lora_zimage",
            "ss_base_model_version": "z_image",
            "modelspec.architecture": "Z-Image/lora",
            "modelspec.implementation": "https://github.com/Tongyi-MAI/Z-Image",
            "modelspec.resolution": "1024x1024",
        }

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As :meth:`Family.encode_prompts`, but "prompt_embeds" is padded with zeros.

        "prompt_lengths", (len(prompts),), int64, on the CPU, has the lengths without them; the
        pipeline has a list of prompts.
        """
        tokenizer, encoder = self._component("tokenizer"), self._component("text_encoder")
        texts = [self._in_template(prompt) for prompt in prompts]
        tokens = tokenize(tokenizer, texts, self._length(MAX_SEQUENCE_LENGTH))
        states = encoder(
            input_ids=to_device(tokens.input_ids, encoder.device),
            attention_mask=to_device(tokens.attention_mask.bool(), encoder.device),
            output_hidden_states=True,
        ).hidden_states[-2]
        rows = unpad_sequences(states, tokens.attention_mask)
        return {
            "prompt_embeds": pad_sequences(rows),
            "prompt_lengths": tokens.attention_mask.sum(1),
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
        prompts = conditions["prompt_embeds"].to(dtype)
        lengths = conditions["prompt_lengths"].tolist()
        answers = self.denoiser(
            list(noisy.to(dtype)[:, :, None].unbind()),
            1.0 - t / self._train_timesteps,
            [prompt[:length] for prompt, length in zip(prompts, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(answers)[:, :, 0]

    def denoiser_kwargs(self, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        lengths = conditions["prompt_lengths"].tolist()
        prompts = zip(conditions["prompt_embeds"], lengths, strict=True)
        return {"cap_feats": [prompt[:length] for prompt, length in prompts]}

    def latent_grid(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        if isinstance(arguments["x"][0], list):
            raise PipelineError(
                "the denoiser reads other pictures beside the one it draws",
                where="image",
                fix="use the pipeline without reference images",
            )
        return super().latent_grid(arguments)

    def token_offsets(
        self, kind: TokenKind, texts: int, grid: tuple[int, int, int]
    ) -> tuple[int, int]:
        return 0, math.ceil(math.prod(grid) / _TOKEN_MULTIPLE) * _TOKEN_MULTIPLE

    def rotations(
        self, arguments: Mapping[str, Any], texts: int, grid: tuple[int, int, int]
    ) -> tuple[Tensor | None, Tensor | None]:
        joint, (_, text) = arguments["freqs_cis"], self.token_offsets("picture_text", texts, grid)
        return joint[:, : math.prod(grid)], joint[:, text : text + texts]

    def prompt_text(self, prompt: str) -> PromptText:
        tokenizer = self._component("tokenizer")
        return PromptText(
            tokenizer, self._in_template(prompt), 0, self._length(MAX_SEQUENCE_LENGTH)
        )

    def _in_template(self, prompt: str) -> str:
        return str(
            self._component("tokenizer").apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=True,
            )
        )

    def noise_level(self, arguments: Mapping[str, Any]) -> float:
        return 1.0 - float(arguments["t"].max())

    @property
    def default_resolution(self) -> int:
        return 1024  # the pipeline's, independent of the autoencoder's factor

    @property
    def latent_multiple(self) -> int:
        return 2 * self._vae_factor

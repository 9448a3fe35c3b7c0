"""FLUX.2 dev and klein: FLUX.1's successor, which reads several layers of one LLM.

The LLM, Mistral 3 in dev and Qwen3 in klein, reads the prompt in its chat template and takes no new
tokens: a trigger is a plain word of the prompt. dev takes the guidance scale as an input; klein has
classifier-free guidance, except for its distilled models.

The single-stream blocks have one projection for queries, keys, values and the MLP's input, and one
for the outputs of attention and MLP. Each takes one adapter, as in diffusers' training script, so
concepts change those MLPs too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from customize.families.denoiser_inputs import grid_of_positions
from customize.families.flux2_vae import Flux2VAEFamily
from customize.families.native_references import NativeReferences
from customize.families.original_layer_names import RowRange, original_rows
from customize.families.pipeline_components import class_name
from customize.families.rectified_flow import PackedLatentsFamily
from customize.families.token_layout import PromptText, count_prompt_tokens
from customize.families.tokenization import to_device, tokenize

#: How many tokens of prompt and template the pipelines take by default.
MAX_SEQUENCE_LENGTH = 512

#: The number of steps whose shift training uses. The pipelines shift more with fewer steps, to
#: compensate for their size. This number is the upper end of their formula, where the shift equals
#: FLUX.1's; the shift that the models were trained with is not published.
TRAINING_STEPS = 200

_MISTRAL_LAYERS = (10, 20, 30)
_QWEN_LAYERS = (9, 18, 27)

#: The sizes of dev (diffusers' defaults), klein 4B and klein 9B.
_PUBLISHED: tuple[dict[str, Any], ...] = (
    {},
    {
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "guidance_embeds": False,
    },
    {
        "num_layers": 8,
        "num_single_layers": 24,
        "num_attention_heads": 32,
        "joint_attention_dim": 12288,
        "guidance_embeds": False,
    },
)

#: What the pipelines do to reference images.
_REFERENCES: dict[str, Any] = {
    "output_size": "first",
    "size_rule": "shrunk to 1 megapixel if larger; up to 15 pixels of a side are cut off",
    "max_pixels": 1024**2,
    "min_side": 64,
    "max_aspect": 8.0,
}

_DOUBLE, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"

#: The layer names of Black Forest Labs.
_ORIGINALS: dict[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "double_blocks.{}.img_attn.qkv": tuple(f"{_DOUBLE}.attn.to_{x}" for x in "qkv"),
    "double_blocks.{}.img_attn.proj": (f"{_DOUBLE}.attn.to_out.0",),
    "double_blocks.{}.img_mlp.0": (f"{_DOUBLE}.ff.linear_in",),
    "double_blocks.{}.img_mlp.2": (f"{_DOUBLE}.ff.linear_out",),
    "double_blocks.{}.txt_attn.qkv": tuple(f"{_DOUBLE}.attn.add_{x}_proj" for x in "qkv"),
    "double_blocks.{}.txt_attn.proj": (f"{_DOUBLE}.attn.to_add_out",),
    "double_blocks.{}.txt_mlp.0": (f"{_DOUBLE}.ff_context.linear_in",),
    "double_blocks.{}.txt_mlp.2": (f"{_DOUBLE}.ff_context.linear_out",),
    "single_blocks.{}.linear1": (f"{_SINGLE}.attn.to_qkv_mlp_proj",),
    "single_blocks.{}.linear2": (f"{_SINGLE}.attn.to_out",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}


class Flux2(Flux2VAEFamily, PackedLatentsFamily):
    """FLUX.2 dev and klein.

    Components: Flux2Transformer2DModel, Mistral3ForConditionalGeneration or Qwen3ForCausalLM,
    AutoencoderKLFlux2, and a flow-matching scheduler.
    """

    name = "flux2"
    default_guidance = 4.0
    attention_projections = re.compile(
        r"transformer_blocks\.\d+\.attn\."
        r"(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    )
    clip_encoders: ClassVar[dict[str, str]] = {}
    other_encoders = ("text_encoder",)
    native_references = (
        NativeReferences("FLUX.2 dev", ("Flux2Pipeline",), blocks=("flux2",), **_REFERENCES),
        NativeReferences(
            "FLUX.2 klein",
            ("Flux2KleinPipeline",),
            blocks=("flux2-klein",),
            **_REFERENCES,
        ),
        NativeReferences(
            "FLUX.2 klein KV",
            ("Flux2KleinKVPipeline",),
            cache="yes, in every call",
            **_REFERENCES,
        ),
        NativeReferences(
            "FLUX.2 klein inpainting",
            ("Flux2KleinInpaintPipeline",),
            argument="image_reference",
            form="image",  # a list would be a batch
            limit=1,
            order="one image",
            size_rule="shrunk to 1 megapixel if larger; up to 15 pixels of a side are cut off",
            max_pixels=1024**2,
        ),
    )
    token_kinds: ClassVar = {
        r"transformer_blocks\.\d+\.attn\.(add_(q|k|v)_proj|to_add_out)": "text",
        r"transformer_blocks\.\d+\.ff_context\..+|context_embedder": "text",
        r"transformer_blocks\.\d+\.(attn|ff)\..+|x_embedder|proj_out": "picture",
        r"single_transformer_blocks\.\d+\.attn\..+": "text_picture",
    }
    # As in FLUX.1.
    text_attention_kinds: ClassVar = {r"transformer_blocks\.\d+\.attn": ("to_q", "add_k_proj")}
    patch = 1
    _width_factor = 24  # the single-stream blocks project to nine widths at once

    @classmethod
    def matches(cls, components: Mapping[str, Any]) -> bool:
        return class_name(components.get("transformer")) == "Flux2Transformer2DModel"

    @classmethod
    def published_models(cls) -> list[dict[str, nn.Module]]:
        from diffusers import Flux2Transformer2DModel

        return [{"transformer": Flux2Transformer2DModel(**size)} for size in _PUBLISHED]

    def original_names(self) -> dict[str, tuple[RowRange, ...]]:
        # The original's last modulation returns (shift, scale), that of diffusers (scale, shift).
        layers = self.layers(self.denoiser_key)
        return original_rows(layers, _ORIGINALS, lambda name, _: name == "norm_out.linear")

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        encoder = self._component("text_encoder")
        mistral = class_name(encoder).startswith("Mistral")
        tokens = self._mistral_tokens(prompts) if mistral else self._qwen_tokens(prompts)
        states = encoder(
            input_ids=to_device(tokens["input_ids"], encoder.device),
            attention_mask=to_device(tokens["attention_mask"], encoder.device),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        layers = _MISTRAL_LAYERS if mistral else _QWEN_LAYERS
        # The states of all layers are concatenated along the width.
        return {"prompt_embeds": torch.cat([states[i] for i in layers], -1).to(encoder.dtype)}

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
        scale = None
        if self.has_guidance_input:
            scale = torch.full((len(noisy),), guidance, device=noisy.device)
        # (time, row, column, position in the prompt)
        positions = torch.arange(prompt.shape[1], device=noisy.device)[:, None]
        answer = self.denoiser(
            hidden_states=self.pack(noisy.to(dtype)),
            timestep=t / self._train_timesteps,
            guidance=scale,
            encoder_hidden_states=prompt,
            txt_ids=functional.pad(positions, (3, 0)),
            img_ids=functional.pad(self._positions(noisy), (0, 1)),
            return_dict=False,
        )[0]
        return self.unpack(answer, *noisy.shape[-2:])

    def latent_grid(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        return grid_of_positions(arguments["img_ids"])

    def prompt_text(self, prompt: str) -> PromptText:
        tokenizer = self._component("tokenizer")
        if class_name(self._component("text_encoder")).startswith("Mistral"):
            text = tokenizer.apply_chat_template(
                _mistral_messages([prompt])[0], add_generation_prompt=False, tokenize=False
            )
            mask = self._mistral_tokens([prompt])["attention_mask"][0]
            tokenizer = tokenizer.tokenizer
        else:
            text = _qwen_text(tokenizer, prompt)
            mask = self._qwen_tokens([prompt])["attention_mask"][0]
        read = PromptText(
            tokenizer, text, 0, self._length(MAX_SEQUENCE_LENGTH), special_tokens=False
        )
        # Padding may come first, and a token that begins each text.
        attended = mask.nonzero()[:, 0]
        extra = len(attended) - min(count_prompt_tokens(read), self._length(MAX_SEQUENCE_LENGTH))
        return dataclasses.replace(read, shift=int(attended[0]) + extra)

    @property
    def has_guidance_input(self) -> bool:
        return bool(self.denoiser.config.guidance_embeds)

    def relevant_config(self) -> dict[str, Any]:
        return super().relevant_config() | {"is_distilled": self._is_distilled}

    def is_guided(self, scale: float) -> bool:
        return super().is_guided(scale) and not self._is_distilled

    @property
    def _is_distilled(self) -> bool:
        return bool(self.pipeline_config.get("is_distilled", False))

    @property
    def _latent_side(self) -> int:
        return super()._latent_side // 2  # a latent is a patch of 2 x 2 of the autoencoder's

    def _mu(self, shape: Sequence[int], steps: int | None = None) -> float:
        return empirical_mu(self._picture_tokens(shape), steps or TRAINING_STEPS)

    def _mistral_tokens(self, prompts: Sequence[str]) -> Any:
        return self._component("tokenizer").apply_chat_template(
            _mistral_messages(prompts),
            add_generation_prompt=False,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={
                "padding": "max_length",
                "truncation": True,
                "max_length": self._length(MAX_SEQUENCE_LENGTH),
            },
        )

    def _qwen_tokens(self, prompts: Sequence[str]) -> Any:
        tokenizer = self._component("tokenizer")
        texts = [_qwen_text(tokenizer, prompt) for prompt in prompts]
        return tokenize(tokenizer, texts, self._length(MAX_SEQUENCE_LENGTH))


def _mistral_messages(prompts: Sequence[str]) -> list[list[dict[str, Any]]]:
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

    def message(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}]}

    # The processor would take the word for a picture.
    requests = [message("user", prompt.replace("[IMG]", "")) for prompt in prompts]
    return [[message("system", SYSTEM_MESSAGE), request] for request in requests]


def _qwen_text(tokenizer: Any, prompt: str) -> str:
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
    )


def empirical_mu(tokens: int, steps: int) -> float:
    """Compute the dynamic shift of FLUX.2, an empirical formula of its pipelines.

    It interpolates between a line in tokens for 10 steps and FLUX.1's for 200 steps; pictures of
    more than 4300 tokens have the latter.

    Args:
        tokens: Number of the picture's tokens.
        steps: Number of sampling steps.
    """
    many = 0.45666666 + 0.00016927 * tokens
    if tokens > 4300:
        return many
    few = 1.89833333 + 8.73809524e-05 * tokens
    return few + (many - few) * (steps - 10) / 190

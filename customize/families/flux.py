"""FLUX.1 dev and schnell: a multimodal transformer on latents packed two by two.

CLIP encodes only the pooled condition, T5 the tokens. dev takes the guidance scale as an input.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from customize.families.denoiser_inputs import grid_of_positions
from customize.families.native_references import NativeReferences
from customize.families.original_layer_names import RowRange, clip_text_model, original_rows
from customize.families.pipeline_components import class_name
from customize.families.rectified_flow import PackedLatentsFamily
from customize.families.token_layout import PromptText
from customize.families.tokenization import to_device, tokenize

#: How many T5 tokens the pipeline takes by default.
MAX_SEQUENCE_LENGTH = 512


_DOUBLE, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
_QKV = tuple(f"{_DOUBLE}.attn.{name}" for name in ("to_q", "to_k", "to_v"))
_TEXT_QKV = tuple(f"{_DOUBLE}.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj"))
_SINGLE_QKV = tuple(f"{_SINGLE}.attn.{name}" for name in ("to_q", "to_k", "to_v"))

#: The layer names of Black Forest Labs and of XLabs' files (the attention's "processor").
_ORIGINALS: dict[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "double_blocks.{}.img_mod.lin": (f"{_DOUBLE}.norm1.linear",),
    "double_blocks.{}.img_attn.qkv": _QKV,
    "double_blocks.{}.img_attn.proj": (f"{_DOUBLE}.attn.to_out.0",),
    "double_blocks.{}.img_mlp.0": (f"{_DOUBLE}.ff.net.0.proj",),
    "double_blocks.{}.img_mlp.2": (f"{_DOUBLE}.ff.net.2",),
    "double_blocks.{}.txt_mod.lin": (f"{_DOUBLE}.norm1_context.linear",),
    "double_blocks.{}.txt_attn.qkv": _TEXT_QKV,
    "double_blocks.{}.txt_attn.proj": (f"{_DOUBLE}.attn.to_add_out",),
    "double_blocks.{}.txt_mlp.0": (f"{_DOUBLE}.ff_context.net.0.proj",),
    "double_blocks.{}.txt_mlp.2": (f"{_DOUBLE}.ff_context.net.2",),
    "single_blocks.{}.modulation.lin": (f"{_SINGLE}.norm.linear",),
    "single_blocks.{}.linear1": (*_SINGLE_QKV, f"{_SINGLE}.proj_mlp"),
    "single_blocks.{}.linear2": (f"{_SINGLE}.proj_out",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "double_blocks.{}.processor.qkv_lora1": _QKV,
    "double_blocks.{}.processor.proj_lora1": (f"{_DOUBLE}.attn.to_out.0",),
    "double_blocks.{}.processor.qkv_lora2": _TEXT_QKV,
    "double_blocks.{}.processor.proj_lora2": (f"{_DOUBLE}.attn.to_add_out",),
    "single_blocks.{}.processor.qkv_lora": _SINGLE_QKV,
    "single_blocks.{}.processor.proj_lora": (f"{_SINGLE}.proj_out",),
}


class Flux(PackedLatentsFamily):
    """FLUX.1 dev and schnell.

    Components: FluxTransformer2DModel, CLIPTextModel, T5EncoderModel, AutoencoderKL, and a
    flow-matching scheduler.
    """

    name = "flux"
    attention_projections = re.compile(
        r"(single_)?transformer_blocks\.\d+\.attn\."
        r"(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    )
    clip_encoders: ClassVar[dict[str, str]] = {"text_encoder": "tokenizer"}
    other_encoders = ("text_encoder_2",)
    token_kinds: ClassVar = {
        r"transformer_blocks\.\d+\.attn\.(add_(q|k|v)_proj|to_add_out)": "text",
        r"transformer_blocks\.\d+\.ff_context\..+|context_embedder": "text",
        r"transformer_blocks\.\d+\.(attn|ff)\..+|x_embedder|proj_out": "picture",
        r"single_transformer_blocks\.\d+\.(attn\..+|proj_mlp|proj_out)": "text_picture",
    }
    # The blocks with a stream each are those that tell things apart (LoRAShop, arXiv 2505.23758).
    text_attention_kinds: ClassVar = {r"transformer_blocks\.\d+\.attn": ("to_q", "add_k_proj")}
    native_references = (
        NativeReferences(
            model="FLUX.1 Kontext",
            pipelines=("FluxKontextPipeline",),
            blocks=("flux-kontext",),
            form="image",  # a list would be a batch, resized to the size of its first image
            limit=1,
            order="one image",
            size_rule="stretched to the nearest of its trained aspect ratios, about 1 megapixel",
            max_pixels=1024**2,
        ),
        NativeReferences(
            model="FLUX.1 Redux (prior)",
            pipelines=("FluxPriorReduxPipeline",),
            prompts="one prompt",
            output_size="no image",
            order="none: their tokens are summed",
            size_rule="resized to the square of its image encoder",
            scale_arguments=("prompt_embeds_scale", "pooled_prompt_embeds_scale"),
        ),
    )

    @classmethod
    def matches(cls, components: Mapping[str, Any]) -> bool:
        return class_name(components.get("transformer")) == "FluxTransformer2DModel"

    @classmethod
    def published_models(cls) -> list[dict[str, nn.Module]]:
        from diffusers import FluxTransformer2DModel

        transformer = FluxTransformer2DModel(guidance_embeds=True)
        return [{"transformer": transformer, "text_encoder": clip_text_model(768, 12)}]

    def original_names(self) -> dict[str, tuple[RowRange, ...]]:
        # The original's last modulation returns (shift, scale), that of diffusers (scale, shift).
        layers = self.layers(self.denoiser_key)
        return original_rows(layers, _ORIGINALS, lambda name, _: name == "norm_out.linear")

    def kohya_metadata(self) -> dict[str, str]:
        kind = "dev" if self.has_guidance_input else "schnell"
        return {
            "ss_network_module": "networks.lora_flux",
            "ss_base_model_version": "flux1",
            "modelspec.architecture": f"flux-1-{kind}/lora",
            "modelspec.implementation": "https://github.com/black-forest-labs/flux",
            "modelspec.resolution": "1024x1024",
        }

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        conditions = self.encode_clip_prompts(prompts)
        device = conditions["pooled_prompt_embeds"].device
        t5 = self._component("text_encoder_2")
        ids = tokenize(
            self._component("tokenizer_2"), prompts, self._length(MAX_SEQUENCE_LENGTH)
        ).input_ids
        hidden = t5(to_device(ids, t5.device))[0]
        return {"prompt_embeds": hidden.to(device, t5.dtype)} | conditions

    def encode_clip_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        tokenizer, clip = self._component("tokenizer"), self._component("text_encoder")
        ids = tokenize(tokenizer, prompts, tokenizer.model_max_length).input_ids
        pooled = clip(to_device(ids, clip.device)).pooler_output
        return {"pooled_prompt_embeds": pooled.to(clip.dtype)}

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
        if self.has_guidance_input:
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

    def denoiser_kwargs(self, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        pooled = conditions["pooled_prompt_embeds"]
        return super().denoiser_kwargs(conditions) | {"pooled_projections": pooled}

    def latent_grid(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        return grid_of_positions(arguments["img_ids"])

    def prompt_text(self, prompt: str) -> PromptText:
        return PromptText(
            self._component("tokenizer_2"), prompt, 0, self._length(MAX_SEQUENCE_LENGTH)
        )

    @property
    def default_guidance(self) -> float:  # type: ignore[override]
        return 3.5 if self.has_guidance_input else self.no_guidance

    @property
    def guidance_needs_negative_prompt(self) -> bool:
        return not self.has_guidance_input

    @property
    def has_guidance_input(self) -> bool:
        return bool(self.denoiser.config.guidance_embeds)

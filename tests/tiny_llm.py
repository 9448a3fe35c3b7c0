"""Real pipelines of newer families with an LLM as text encoder; see tests/tiny.py.

Qwen-Image 2.1 has pictures of 32 x 32 in latents of 4 x 2 x 2, FLUX.2 in 16 x 8 x 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    ProcessorMixin,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
)

from tests.tiny import qwen_tokenizer, qwen_vae, seeded

#: Messages whose contents are texts, or lists of parts.
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)

_LLM: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_EYES: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 16,
    "deepstack_visual_indexes": [0],
}


class TextProcessor(ProcessorMixin):
    """The text processing of PixtralProcessor and Qwen3VLProcessor, which need torchvision."""

    return_mm_token_type_ids = True

    def __init__(
        self, tokenizer: Any = None, image_token: str = "[IMG]", chat_template: str | None = None
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)


def _flux2_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.5, 1.5)
    return vae


def _flux2_transformer(width: int, guidance: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * width,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )


def tiny_flux2() -> Flux2Pipeline:
    """FLUX.2 dev with a transformer of width 32 and a Mistral of 16, deep enough for its layers."""
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens("[IMG]", special_tokens=True)
    processor = TextProcessor(tokenizer, chat_template=CHAT)
    with seeded():
        text_encoder = Mistral3ForConditionalGeneration(
            Mistral3Config(
                text_config={
                    **_LLM,
                    "model_type": "mistral",
                    "vocab_size": len(tokenizer),
                    "num_hidden_layers": 30,
                },
                vision_config={
                    "model_type": "pixtral",
                    "hidden_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "intermediate_size": 16,
                    "image_size": 32,
                    "patch_size": 16,
                },
                image_token_index=processor.image_token_id,
            )
        )
        vae, transformer = _flux2_vae(), _flux2_transformer(16, guidance=True)
    pipe = Flux2Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=processor,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_flux2_klein(distilled: bool = False) -> Flux2KleinPipeline:
    """FLUX.2 klein with a transformer of width 32 and a Qwen3 of 16, deep enough for its layers."""
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT
    with seeded():
        text_encoder = Qwen3ForCausalLM(
            Qwen3Config(
                **_LLM,
                vocab_size=len(tokenizer),
                num_hidden_layers=28,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        vae, transformer = _flux2_vae(), _flux2_transformer(16, guidance=False)
    pipe = Flux2KleinPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        is_distilled=distilled,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _qwen3_vl(vocabulary: int, layers: int) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config={
            **_LLM,
            "vocab_size": vocabulary,
            "num_hidden_layers": layers,
            "rope_parameters": {
                "mrope_section": [2, 1, 1],
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_interleaved": True,
            },
        },
        vision_config=_EYES,
    )


def tiny_krea2(distilled: bool = False, layers: Sequence[int] = (1, 2)) -> Krea2Pipeline:
    """Krea 2 with a transformer of width 32 that reads these layers of an LLM of 16."""
    tokenizer = qwen_tokenizer()
    with seeded():
        text_encoder = Qwen3VLModel(_qwen3_vl(len(tokenizer), max(layers) + 1))
        vae = qwen_vae()
        transformer = Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=64,
            timestep_embed_dim=32,
            text_hidden_dim=16,
            num_text_layers=len(layers),
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=32,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 6, 6),
        )
        for module in (transformer.final_layer, *transformer.transformer_blocks):
            torch.nn.init.normal_(module.scale_shift_table, std=0.5)  # else gates would be 0
    pipe = Krea2Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=6400
        ),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        text_encoder_select_layers=tuple(layers),
        is_distilled=distilled,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_qwen_image_21(sigmas: list[float] | None = None) -> QwenImage21Pipeline:
    """Qwen-Image 2.1 with a transformer of width 32 and an LLM of 16; `sigmas` for its levels."""
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens("<|image_pad|>", special_tokens=True)
    processor = TextProcessor(tokenizer, "<|image_pad|>", CHAT)
    config = _qwen3_vl(len(tokenizer), 2)
    config.image_token_id = processor.image_token_id
    with seeded():
        text_encoder = Qwen3VLForConditionalGeneration(config)
        # Tests of images need a norm whose output differs from its input.
        torch.nn.init.uniform_(text_encoder.model.language_model.norm.weight, 0.5, 2.0)
        vae = AutoencoderKLQwenImage21(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 2, 2, 2],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[0.5, 0.6, 0.7, 0.8],
        )
        transformer = QwenImage21Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=16,
            axes_dims_rope=(4, 6, 6),
        )
    pipe = QwenImage21Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        processor=processor,
        sample_sigmas=sigmas,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe

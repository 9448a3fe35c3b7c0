"""Published models at their true sizes, on the meta device: shapes without weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
)

from customize.families import Family, family_of
from tests.families.test_true_sizes import FLUX_2, clip, sd3_family, sd_family, sdxl_family


def vae(latent_channels: int, sample_size: int, **changes: Any) -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=latent_channels,
            sample_size=sample_size,
            **changes,
        )


def t5_xxl() -> T5EncoderModel:
    with torch.device("meta"):
        return T5EncoderModel(
            T5Config(
                vocab_size=32128,
                d_model=4096,
                d_kv=64,
                d_ff=10240,
                num_layers=24,
                num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        )


def sd15() -> Family:
    return _half(sd_family(768, 12, attention_head_dim=8).components | {"vae": vae(4, 512)})


def sdxl() -> Family:
    return _half(sdxl_family().components | {"vae": vae(4, 1024, force_upcast=True)})


def sd35_large() -> Family:
    models = sd3_family(38, 38, qk_norm="rms_norm").components
    return _half(models | {"text_encoder_3": t5_xxl(), "vae": vae(16, 1024)})


def flux_dev() -> Family:
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    return _half(
        {
            "transformer": transformer,
            "text_encoder": clip(768, 12, 12),
            "text_encoder_2": t5_xxl(),
            "vae": vae(16, 1024),
        }
    )


def qwen_image() -> Family:
    """Its text encoder is Qwen2.5-VL of 7 B parameters."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        vision_config={"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
    )
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel()
        text_encoder = Qwen2_5_VLForConditionalGeneration(config)
        autoencoder = AutoencoderKLQwenImage()
    return _half({"transformer": transformer, "text_encoder": text_encoder, "vae": autoencoder})


#: Of Qwen3 4B, and of the language model in Qwen3-VL 4B.
QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


def flux2_dev() -> Family:
    """Its text encoder is Mistral Small 3 of 24 B parameters."""
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": 131072,
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 1540,
            "patch_size": 14,
        },
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        text_encoder = Mistral3ForConditionalGeneration(config)
    return _flux2("dev", text_encoder)


def flux2_klein() -> Family:
    with torch.device("meta"):
        text_encoder = Qwen3ForCausalLM(Qwen3Config(**QWEN3_4B))
    return _flux2("klein-4b", text_encoder)


def _flux2(model: str, text_encoder: Any) -> Family:
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel(**FLUX_2[model])
        autoencoder = AutoencoderKLFlux2()
    return _half({"transformer": transformer, "text_encoder": text_encoder, "vae": autoencoder})


def krea2() -> Family:
    vision = {"hidden_size": 1024, "depth": 24, "intermediate_size": 4096, "out_hidden_size": 2560}
    with torch.device("meta"):
        transformer = Krea2Transformer2DModel()
        text_encoder = Qwen3VLModel(Qwen3VLConfig(text_config=QWEN3_4B, vision_config=vision))
        autoencoder = AutoencoderKLQwenImage()
    return _half({"transformer": transformer, "text_encoder": text_encoder, "vae": autoencoder})


def qwen_image_21() -> Family:
    """Its text encoder is Qwen3-VL of 8 B parameters."""
    text = {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
    vision = {
        "hidden_size": 1152,
        "depth": 27,
        "intermediate_size": 4304,
        "out_hidden_size": 4096,
        "deepstack_visual_indexes": [8, 16, 24],
    }
    config = Qwen3VLConfig(
        text_config=QWEN3_4B | text, vision_config=vision, tie_word_embeddings=False
    )
    with torch.device("meta"):
        transformer = QwenImage21Transformer2DModel()
        text_encoder = Qwen3VLForConditionalGeneration(config)
        autoencoder = AutoencoderKLQwenImage21()
    return _half({"transformer": transformer, "text_encoder": text_encoder, "vae": autoencoder})


def z_image() -> Family:
    with torch.device("meta"):
        transformer = ZImageTransformer2DModel()
        text_encoder = Qwen3Model(Qwen3Config(**QWEN3_4B))
    autoencoder = vae(16, 1024)
    return _half({"transformer": transformer, "text_encoder": text_encoder, "vae": autoencoder})


def _half(models: dict[str, Any]) -> Family:
    return family_of({key: nn.Module.to(model, torch.bfloat16) for key, model in models.items()})

"""Published models at their true sizes, on the meta device: shapes without weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
)
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from customize.families import Family, family_of
from tests.families.test_true_sizes import clip, sd3_family, sd_family, sdxl_family


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


def _half(models: dict[str, Any]) -> Family:
    return family_of({key: nn.Module.to(model, torch.bfloat16) for key, model in models.items()})

"""SDXL and FLUX.1 dev at their true sizes, with random weights created on the device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from _common import ROOT

sys.path.insert(0, str(ROOT))

#: Tokens of a CLIP prompt in the published models.
CLIP_TOKENS = 77


@contextmanager
def _default(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Create new tensors on this device with this dtype, reproducibly by seed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _clip(width: int, layers: int, heads: int, projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        hidden_act="gelu" if projection else "quick_gelu",
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def _tokenizer() -> Any:
    from tests.tiny import clip_tokenizer

    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = CLIP_TOKENS
    return tokenizer


def _vae(latent_channels: int, **config: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=latent_channels,
        sample_size=1024,
        **config,
    )


def sdxl(device: torch.device, dtype: torch.dtype) -> Any:
    """StableDiffusionXLPipeline: a UNet of 2.6 B parameters."""
    from diffusers import (
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )

    with _default(device, dtype):
        unet = UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        text_encoder, text_encoder_2 = _clip(768, 12, 12), _clip(1280, 32, 20, projection=True)
        vae = _vae(4, scaling_factor=0.13025, force_upcast=True)
    return _quiet(
        StableDiffusionXLPipeline(
            vae=vae.eval(),
            text_encoder=text_encoder.eval(),
            text_encoder_2=text_encoder_2.eval(),
            tokenizer=_tokenizer(),
            tokenizer_2=_tokenizer(),
            unet=unet.eval(),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
            ),
            add_watermarker=False,
        ).to(dtype=dtype)
    )


def flux(device: torch.device, dtype: torch.dtype) -> Any:
    """FluxPipeline: a transformer of 11.9 B parameters and a T5 of 4.7 B."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )
    from transformers import T5Config, T5EncoderModel

    from tests.tiny import t5_tokenizer

    with _default(device, dtype):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        text_encoder = _clip(768, 12, 12)
        text_encoder_2 = T5EncoderModel(
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
        vae = _vae(16, scaling_factor=0.3611, shift_factor=0.1159)
    return _quiet(
        FluxPipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=vae.eval(),
            text_encoder=text_encoder.eval(),
            tokenizer=_tokenizer(),
            text_encoder_2=text_encoder_2.eval(),
            tokenizer_2=t5_tokenizer(),
        ).to(dtype=dtype)
    )


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _tiny(name: str) -> Callable[[torch.device, torch.dtype], Any]:
    def make(device: torch.device, dtype: torch.dtype) -> Any:
        from tests import tiny

        return getattr(tiny, name)().to(device, dtype)

    return make


TRUE: dict[str, Callable[[torch.device, torch.dtype], Any]] = {"SDXL": sdxl, "FLUX.1": flux}
#: The tests' tiny pipelines, for a run on a CPU.
TINY: dict[str, Callable[[torch.device, torch.dtype], Any]] = {
    "SDXL": _tiny("tiny_sdxl"),
    "FLUX.1": _tiny("tiny_flux"),
}

"""Real pipelines of video models at the smallest size, like those of :mod:`tests.tiny`.

Pictures of one frame are 32 x 32, their latents 4 x 16 x 16.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    MotionAdapter,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from tests.tiny import t5_tokenizer, tiny_sd


def _wan_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )


def tiny_wan(model: Literal["2.1", "2.2-5b", "2.2-14b"] = "2.1") -> WanPipeline:
    """Wan with a transformer of width 32 and a UMT5 of 16.

    Like Wan 2.2 5B it has a time for each token, and here a scheduler of another kind; like Wan 2.2
    14B a second transformer.
    """
    tokenizer = t5_tokenizer()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer),
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=2,
                num_heads=2,
            )
        )
        vae = AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[0.5, 0.6, 0.7, 0.8],
            scale_factor_temporal=2,
            scale_factor_spatial=2,
        )
        transformer = _wan_transformer()
        transformer_2 = _wan_transformer().eval() if model == "2.2-14b" else None
    scheduler: Any = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    if model == "2.2-5b":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        scheduler=scheduler,
        transformer=transformer.eval(),
        transformer_2=transformer_2,
        boundary_ratio=0.875 if transformer_2 else None,
        expand_timesteps=model == "2.2-5b",
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_animatediff() -> AnimateDiffPipeline:
    """The parts of tiny_sd with motion modules in the UNet, for videos of up to 8 frames."""
    parts = tiny_sd().components
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        adapter = MotionAdapter(
            block_out_channels=(16, 32),
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=8,
            motion_max_seq_length=8,
        )
        shared = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
        pipe = AnimateDiffPipeline(
            **{key: parts[key] for key in shared}, motion_adapter=adapter.eval()
        )
    pipe.unet.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_cogvideox(rotary: bool = False, multistep: bool = False) -> CogVideoXPipeline:
    """CogVideoX with a transformer of width 32 and a T5 of 16.

    Positions are added, as in 2B, or `rotary`, as in 5B. With `multistep` the scheduler is DPM.
    """
    tokenizer = t5_tokenizer()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=1,
                num_heads=2,
                feed_forward_proj="gated-gelu",
            )
        )
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 2,
            up_block_types=("CogVideoXUpBlock3D",) * 2,
            block_out_channels=(8, 16),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            temporal_compression_ratio=2,
            sample_height=32,
            sample_width=32,
            scaling_factor=0.7,
        )
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=16,
            num_layers=2,
            sample_width=24,
            sample_height=16,
            sample_frames=5,
            temporal_compression_ratio=2,
            use_rotary_positional_embeddings=rotary,
        )
    scheduler: Any = CogVideoXDPMScheduler if multistep else CogVideoXDDIMScheduler
    pipe = CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=scheduler(
            beta_end=0.012,
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0 if rotary else 3.0,
            timestep_spacing="trailing",
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe

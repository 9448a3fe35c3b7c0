"""Real pipelines of video models at the smallest size, like those of :mod:`tests.tiny`.

Pictures of one frame are 32 x 32, their latents 4 x 16 x 16.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    MotionAdapter,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.tiny import SPACE, WORDS, seeded, t5_tokenizer, tiny_sd


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


def tiny_wan(
    model: Literal["2.1", "2.2-5b", "2.2-14b"] = "2.1", boundary_ratio: float | None = 0.875
) -> WanPipeline:
    """Wan with a transformer of width 32 and a UMT5 of 16.

    Like Wan 2.2 5B it has a timestep for each token, and here a scheduler of another kind; like Wan
    2.2 14B a second transformer, which is used below `boundary_ratio`.
    """
    tokenizer = t5_tokenizer()
    with seeded():
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
        boundary_ratio=boundary_ratio if transformer_2 else None,
        expand_timesteps=model == "2.2-5b",
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_animatediff() -> AnimateDiffPipeline:
    """The parts of tiny_sd with motion modules in the UNet, for videos of up to 8 frames."""
    parts = tiny_sd().components
    with seeded():
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
    with seeded():
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


def gemma_tokenizer() -> GemmaTokenizer:
    """A Gemma byte-pair tokenizer in which each of WORDS is one token."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        pieces = [SPACE, *word]
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = None
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", SPACE]
    tokens += [*"abcdefghijklmnopqrstuvwxyz<>_,.", *(left + right for left, right in merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return GemmaTokenizer(vocab=vocab, merges=list(merges), model_max_length=1024)


def isolate(pipe: LTX2Pipeline) -> None:
    """Isolate the two streams of LTX-2 in all calls, as during training."""
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: forward(
        *args, **kwargs | {"isolate_modalities": True}
    )


def tiny_ltx2(later: bool = False) -> LTX2Pipeline:
    """LTX-2 with a video stream of width 32, an audio stream of 16, and a Gemma of 16.

    `later` is like LTX-2.3: the prompt has a separate width for each stream, and is modulated by
    the noise level.
    """
    tokenizer = gemma_tokenizer()
    with seeded():
        text_encoder = Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config={
                    "vocab_size": len(tokenizer),
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "head_dim": 8,
                },
                vision_config={
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "image_size": 28,
                    "patch_size": 14,
                },
                image_token_index=0,
            )
        )
        connectors = LTX2TextConnectors(
            caption_channels=16,
            text_proj_in_factor=3,
            video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=16 if later else 8,
            video_connector_num_layers=1,
            audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=8,
            audio_connector_num_layers=1,
            per_modality_projections=later,
            video_hidden_dim=32,
            audio_hidden_dim=16,
        )
        vae = AutoencoderKLLTX2Video(
            latent_channels=4,
            block_out_channels=(8,),
            down_block_types=("LTX2VideoDownBlock3D",),
            layers_per_block=(1, 1),
            spatio_temporal_scaling=(True,),
            downsample_type=("spatiotemporal",),
            decoder_block_out_channels=(8,),
            decoder_layers_per_block=(1, 1),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            upsample_type=("spatiotemporal",),
            upsample_residual=(False,),
            upsample_factor=(1,),
            patch_size=1,
            scaling_factor=0.9,
        )
        vae.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
        vae.latents_std.copy_(torch.tensor([0.5, 0.6, 0.7, 0.8]))
        audio_vae = AutoencoderKLLTX2Audio(
            base_channels=4,
            ch_mult=(1,),
            num_res_blocks=1,
            resolution=32,
            latent_channels=2,
            mel_bins=8,
        )
        vocoder = LTX2Vocoder(
            in_channels=16,
            hidden_channels=16,
            upsample_kernel_sizes=[4],
            upsample_factors=[2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
        )
        transformer = LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            vae_scale_factors=(2, 2, 2),
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            num_layers=2,
            caption_channels=16,
            use_prompt_embeddings=not later,
            cross_attn_mod=later,
            audio_cross_attn_mod=later,
        )
    pipe = LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=64,
            max_image_seq_len=1024,
        ),
        vae=vae.eval(),
        audio_vae=audio_vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        connectors=connectors.eval(),
        transformer=transformer.eval(),
        vocoder=vocoder.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe

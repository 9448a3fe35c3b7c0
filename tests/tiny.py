"""Real pipelines of every family at the smallest size, with seeded random weights.

All calls build new objects that are equal bit for bit. Pictures are 32 x 32, latents 4 x 16 x 16.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ClassifierFreeGuidance,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux3AutoBlocks,
    Flux3ModularPipeline,
    Flux3Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    ModularPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

Prediction = Literal["epsilon", "v_prediction"]

#: Words that are one CLIP token each; all others fall into letters.
WORDS = (
    *(
        "forest",
        "a",
        "photo",
        "picture",
        "of",
        "on",
        "in",
        "with",
        "and",
        "the",
        "dog",
        "cat",
        "car",
        "cup",
    ),
    *("hat", "red", "blue", "striped", "beach", "room", "wearing", "two"),
)
CLIP_LENGTH = 24
#: The `eos_token_id` in the published configurations, which is not the tokenizer's.
PUBLISHED_END = 2
SPACE = "▁"  # how T5 writes the start of a word
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@contextmanager
def seeded() -> Iterator[None]:
    """Draw the same random numbers each time, and leave those of the caller alone."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        yield


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer in which each of WORDS is one token."""
    letters = sorted(ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = None
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [left + right for left, right in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(
        vocab=vocab, merges=list(merges), model_max_length=CLIP_LENGTH, pad_token=pad_token
    )


def t5_tokenizer() -> T5Tokenizer:
    """A T5 unigram tokenizer: words of WORDS, and letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, -4.0)]
    pieces += [(SPACE + word, -2.0) for word in WORDS]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz<>_,."]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A Qwen2 byte-pair tokenizer in which each of WORDS is one token."""
    letters = sorted(ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        pieces = ["\u0120", *word]  # how byte-level tokenizers write a space
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = None
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    tokens = [*letters, *(left + right for left, right in merges), "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    made = Qwen2Tokenizer(vocab=vocab, merges=list(merges))
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def _clip_config(
    tokenizer: CLIPTokenizer, width: int, eos_token_id: int | None = None
) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if eos_token_id is None else eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _vae(
    scaling_factor: float, shift_factor: float | None, latent_channels: int = 4
) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )


def _ddim(prediction: Prediction) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type=prediction,
        steps_offset=1,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=prediction == "v_prediction",
    )


def _t5_config(vocabulary: int) -> T5Config:
    return T5Config(
        vocab_size=vocabulary,
        d_model=48,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )


def tiny_sd(
    prediction: Prediction = "epsilon", few_layers: bool = False
) -> StableDiffusionPipeline:
    """Stable Diffusion with attention of widths 16 and 32 and a CLIP of width 32.

    With v_prediction the schedule ends at zero SNR, as in newer v models. With `few_layers` only
    the middle block has attention, so that the UNet compiles in a third of the time.
    """
    tokenizer = clip_tokenizer()
    with seeded():
        text_encoder = CLIPTextModel(_clip_config(tokenizer, 32))
        vae = _vae(scaling_factor=0.5, shift_factor=None)
        unet = UNet2DConditionModel(
            sample_size=16,
            down_block_types=(("DownBlock2D",) if few_layers else ("CrossAttnDownBlock2D",) * 2),
            up_block_types=(("UpBlock2D",) if few_layers else ("CrossAttnUpBlock2D",) * 2),
            block_out_channels=(32,) if few_layers else (16, 32),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=8,
        )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=_ddim(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sdxl(
    prediction: Prediction = "epsilon", few_layers: bool = False
) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL with attention of width 32 and CLIPs of 16 and 24.

    As in the published model, the outermost blocks have no attention, and the others have different
    numbers of layers. The scheduler and `few_layers` are those of tiny_sd.
    """
    tokenizer, tokenizer_2 = clip_tokenizer(), clip_tokenizer(pad_token="!")
    with seeded():
        text_encoder = CLIPTextModel(_clip_config(tokenizer, 16, PUBLISHED_END))
        text_encoder_2 = CLIPTextModelWithProjection(_clip_config(tokenizer_2, 24, PUBLISHED_END))
        vae = _vae(scaling_factor=0.5, shift_factor=None)
        unet = UNet2DConditionModel(
            sample_size=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D")[: 1 if few_layers else 2],
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")[1 if few_layers else 0 :],
            block_out_channels=(32,) if few_layers else (16, 32),
            layers_per_block=1,
            transformer_layers_per_block=(1,) if few_layers else (1, 2),
            cross_attention_dim=40,
            attention_head_dim=(4,) if few_layers else (2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 24,
            norm_num_groups=8,
        )
    pipe = StableDiffusionXLPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        text_encoder_2=text_encoder_2.eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet.eval(),
        scheduler=_ddim(prediction),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd3(t5: bool = True, channels: int = 4) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 with a transformer of width 32, CLIPs of 16 and 24, and a T5 of 48.

    The first block has a second attention and queries are normed, as in Stable Diffusion 3.5.
    Without `t5` the third encoder and its tokenizer are None. Its inpainting pipeline needs
    `channels=16`, as published.
    """
    tokenizer, tokenizer_2 = clip_tokenizer(), clip_tokenizer(pad_token="!")
    tokenizer_3 = t5_tokenizer()
    with seeded():
        text_encoder = CLIPTextModelWithProjection(_clip_config(tokenizer, 16, PUBLISHED_END))
        text_encoder_2 = CLIPTextModelWithProjection(_clip_config(tokenizer_2, 24, PUBLISHED_END))
        vae = _vae(scaling_factor=1.5, shift_factor=0.06, latent_channels=channels)
        transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=channels,
            out_channels=channels,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=48,
            caption_projection_dim=32,
            pooled_projection_dim=40,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
        text_encoder_3 = T5EncoderModel(_t5_config(len(tokenizer_3)))
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2.eval(),
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3.eval() if t5 else None,
        tokenizer_3=tokenizer_3 if t5 else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_flux(guidance: bool = True) -> FluxPipeline:
    """FLUX.1 with a transformer of width 32, a CLIP of 16 and a T5 of 48.

    With `guidance` it is like dev: the guidance scale is an input, and the shift grows with
    the picture. Without, like schnell.
    """
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    with seeded():
        text_encoder = CLIPTextModel(_clip_config(tokenizer, 16))
        vae = _vae(scaling_factor=1.5, shift_factor=0.06)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            pooled_projection_dim=16,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 6, 6),
        )
        text_encoder_2 = T5EncoderModel(_t5_config(len(tokenizer_2)))
    pipe = FluxPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance
        ),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2.eval(),
        tokenizer_2=tokenizer_2,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_flux3(flow_map: bool = False) -> Flux3ModularPipeline:
    """FLUX.3, a modular pipeline, with a transformer of width 32 and an LLM of 33 layers of 8.

    The step that rewrites prompts is left out. The processor has Qwen's tokenizer and template;
    that of Qwen3-VL needs torchvision. The autoencoder only cuts patches of 2 x 2, so that latents
    are as large as in other families. With `flow_map` it is like the step-distilled model.
    """
    tokenizer = qwen_tokenizer()
    with seeded():
        text_encoder = Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(
                text_config={
                    "vocab_size": len(tokenizer),
                    "hidden_size": 8,
                    "intermediate_size": 16,
                    "num_hidden_layers": 33,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "head_dim": 8,
                    "rope_parameters": {
                        "mrope_section": [1, 1, 2],
                        "mrope_interleaved": True,
                        "rope_type": "default",
                        "rope_theta": 1e6,
                    },
                },
                vision_config={
                    "depth": 1,
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_heads": 2,
                    "out_hidden_size": 8,
                    "deepstack_visual_indexes": [],
                    "num_position_embeddings": 16,
                },
            )
        )
        vae = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            block_out_channels=(8,),
            layers_per_block=1,
            latent_channels=1,
            norm_num_groups=4,
            sample_size=32,
            mid_block_add_attention=False,
        )
        vae.bn.running_mean.normal_(std=0.1)
        vae.bn.running_var.uniform_(0.2, 0.6)
        transformer = Flux3Transformer2DModel(
            in_channels=4,
            cond_in_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8 * 8,
            timestep_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            flow_map=flow_map,
        )
    blocks = Flux3AutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")
    pipe = blocks.init_pipeline()
    pipe.update_components(
        transformer=transformer.eval(),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=LlavaProcessor(
            image_processor=CLIPImageProcessorPil(), tokenizer=tokenizer, chat_template=CHAT
        ),
    )
    return pipe


def qwen_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 0.6, 0.7, 0.8],
    )


def tiny_qwen_image() -> QwenImagePipeline:
    """Qwen-Image with a transformer of width 32, an LLM of 16 and an autoencoder of videos."""
    tokenizer = qwen_tokenizer()
    with seeded():
        text_encoder = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={
                    "vocab_size": len(tokenizer),
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "rope_parameters": {
                        "mrope_section": [1, 1, 2],
                        "rope_type": "default",
                        "rope_theta": 1e6,
                    },
                },
                vision_config={
                    "depth": 1,
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_heads": 2,
                    "out_hidden_size": 16,
                },
            )
        )
        vae = qwen_vae()
        transformer = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        )
    pipe = QwenImagePipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02
        ),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_z_image() -> ZImagePipeline:
    """Z-Image with a transformer of width 32 and an LLM of 16."""
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT
    with seeded():
        text_encoder = Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        vae = _vae(scaling_factor=1.5, shift_factor=0.06)
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[1024, 32, 32],
        )
    pipe = ZImagePipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def short_prompts(pipe: Any) -> dict[str, int]:
    """The argument that pads prompts to 128 tokens, for a pipeline that has it.

    The usual 512 take a tenth of the time of a test that draws.
    """
    if isinstance(pipe, ModularPipeline):
        names = pipe.blocks.input_names
    else:
        names = list(inspect.signature(pipe.__call__).parameters)
    return {"max_sequence_length": 128} if "max_sequence_length" in names else {}


def drawn(pipe: Any, prompt: str | list[str] | None = None, **call: Any) -> Any:
    """The output of a standard or modular pipeline, of the requested type.

    A video model draws videos of one frame; latents are returned unchanged.

    Args:
        pipe: The pipeline.
        prompt: The prompt; None if the call has prompt embeddings.
        **call: Arguments of the call.
    """
    if isinstance(pipe, ModularPipeline):
        return _drawn_by_blocks(pipe, prompt, call)
    parameters = inspect.signature(pipe.__call__).parameters
    if "stg_scale" in parameters:  # LTX-2 has other kinds of guidance as well
        none = {"stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
        call |= none | {f"audio_{name}": value for name, value in none.items()}
        call["audio_guidance_scale"] = call.get("guidance_scale", 3.0)
    if prompt is not None:
        call["prompt"] = prompt
    if "num_frames" not in parameters:
        return pipe(**call).images
    return _stills(pipe(**call, num_frames=1).frames, call)


def _drawn_by_blocks(pipe: Any, prompt: Any, call: dict[str, Any]) -> Any:
    if isinstance(prompt, list):  # one prompt per call, and several images of it
        prompt, call["num_images_per_prompt"] = prompt[0], len(prompt)
    if "guidance_scale" in call:
        pipe.guider = ClassifierFreeGuidance(guidance_scale=call.pop("guidance_scale"))
    if prompt is not None:
        call["prompt"] = prompt
    if "num_frames" in pipe.blocks.input_names:
        return _stills(pipe(**call, num_frames=1, output="videos"), call)
    latent = call.get("output_type") == "latent"
    call = {**call, "output_type": "pt"} if latent else call
    return pipe(output="latents" if latent else "images", **call)


def _stills(videos: Any, call: dict[str, Any]) -> Any:
    if call.get("output_type") == "latent":
        return videos
    return videos[:, 0] if hasattr(videos, "shape") else [video[0] for video in videos]

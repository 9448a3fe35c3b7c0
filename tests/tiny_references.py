"""Tiny real pipelines of the models that read reference images by themselves.

Qwen's processors of images and texts need torchvision, so their two parts are joined here.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    BriaFibo2Pipeline,
    BriaFibo2Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinInpaintPipeline,
    Flux2KleinKVPipeline,
    FluxKontextPipeline,
    FluxPriorReduxPipeline,
    JoyImageEditPlusPipeline,
    JoyImageEditPlusTransformer3DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    ZImageOmniPipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from transformers import (
    Qwen3VLForConditionalGeneration,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from tests.tiny import qwen_tokenizer, seeded, tiny_flux, tiny_qwen_image, tiny_z_image
from tests.tiny_llm import CHAT, TextProcessor, _qwen3_vl, tiny_flux2_klein, tiny_qwen_image_21
from tests.tiny_video import tiny_wan

_IMAGE, _START, _END = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"


class ImageTextProcessor(TextProcessor):
    """Qwen2VLProcessor and Qwen3VLProcessor without videos."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_token: str = _IMAGE,
        chat_template: str | None = None,
    ) -> None:
        super(TextProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        patches = int(image_inputs["image_grid_thw"][image_idx].prod())
        return self.image_token * (patches // self.image_processor.merge_size**2)


def image_text_processor(
    patch_size: int = 14, chat_template: str | None = None
) -> ImageTextProcessor:
    """A processor whose images have at most 16 tokens."""
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens([_IMAGE, _START, _END], special_tokens=True)
    pixels = (2 * patch_size) ** 2
    images = Qwen2VLImageProcessorPil(
        patch_size=patch_size, merge_size=2, min_pixels=pixels, max_pixels=16 * pixels
    )
    return ImageTextProcessor(images, tokenizer, chat_template=chat_template)


def tiny_kontext() -> FluxKontextPipeline:
    """FLUX.1 Kontext with the models of tiny_flux."""
    return _quiet(FluxKontextPipeline(**_parts(tiny_flux(), "image_encoder", "feature_extractor")))


def tiny_flux2_klein_kv() -> Flux2KleinKVPipeline:
    """FLUX.2 klein KV with the models of tiny_flux2_klein."""
    return _quiet(Flux2KleinKVPipeline(**_parts(tiny_flux2_klein())))


def tiny_flux2_klein_inpaint() -> Flux2KleinInpaintPipeline:
    """FLUX.2 klein's inpainting with the models of tiny_flux2_klein."""
    return _quiet(Flux2KleinInpaintPipeline(**_parts(tiny_flux2_klein())))


def tiny_redux() -> FluxPriorReduxPipeline:
    """FLUX.1 Redux with an image encoder of width 16, and text encoders of FLUX.1."""
    flux = tiny_flux()
    with seeded():
        encoder = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=32,
                patch_size=8,
            )
        )
        embedder = ReduxImageEncoder(16, flux.text_encoder_2.config.d_model)
    return _quiet(
        FluxPriorReduxPipeline(
            image_encoder=encoder.eval(),
            feature_extractor=SiglipImageProcessorPil(size={"height": 32, "width": 32}),
            image_embedder=embedder.eval(),
            text_encoder=flux.text_encoder,
            tokenizer=flux.tokenizer,
            text_encoder_2=flux.text_encoder_2,
            tokenizer_2=flux.tokenizer_2,
        )
    )


def tiny_qwen_edit(plus: bool = True) -> QwenImageEditPlusPipeline | QwenImageEditPipeline:
    """Qwen-Image-Edit, or -Plus, with the models of tiny_qwen_image."""
    parts, processor = _parts(tiny_qwen_image()), image_text_processor()
    _add_image_tokens(parts["text_encoder"], processor)
    cls = QwenImageEditPlusPipeline if plus else QwenImageEditPipeline
    return _quiet(cls(**parts | {"processor": processor, "tokenizer": processor.tokenizer}))


def tiny_qwen_image_21_edit() -> Any:
    """Qwen-Image 2.1 with a processor of images."""
    pipe, processor = tiny_qwen_image_21(), image_text_processor(16, CHAT)
    _add_image_tokens(pipe.text_encoder, processor)
    return _quiet(type(pipe)(**_parts(pipe) | {"processor": processor}))


def tiny_z_image_omni() -> ZImageOmniPipeline:
    """Z-Image Omni with a transformer of width 32 and an image encoder of 16."""
    pipe = tiny_z_image()
    with seeded():
        encoder = Siglip2VisionModel(
            Siglip2VisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_patches=16,
                patch_size=16,
            )
        )
        transformer = ZImageTransformer2DModel(
            **dict(pipe.transformer.config) | {"siglip_feat_dim": 16, "axes_lens": [1024, 64, 64]}
        )
        transformer.siglip_pad_token.data.normal_()
    parts = _parts(pipe) | {"transformer": transformer.eval()}
    processor = Siglip2ImageProcessorPil(patch_size=16, max_num_patches=16)
    # The pipeline encodes references in bfloat16, as the published autoencoder does.
    parts["vae"] = parts["vae"].to(torch.bfloat16)
    return _quiet(ZImageOmniPipeline(**parts, siglip=encoder.eval(), siglip_processor=processor))


def tiny_wan_vace() -> WanVACEPipeline:
    """Wan VACE with a transformer of width 32."""
    parts = _parts(tiny_wan())
    with seeded():
        transformer = WanVACETransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            vace_layers=[0, 1],
            vace_in_channels=2 * 4 + 4,  # inactive and reactive latents, and a mask of 2 x 2
        )
    names = ("tokenizer", "text_encoder", "vae", "scheduler")
    parts = {name: parts[name] for name in names}
    return _quiet(WanVACEPipeline(**parts, transformer=transformer.eval()))


def tiny_joy_image() -> JoyImageEditPlusPipeline:
    """JoyImage-Edit-Plus with a transformer of width 32 and an LLM of 16."""
    processor = image_text_processor(16)
    config = _qwen3_vl(len(processor.tokenizer), 2)
    config.image_token_id = processor.image_token_id
    with seeded():
        text_encoder = Qwen3VLForConditionalGeneration(config)
        transformer = JoyImageEditPlusTransformer3DModel(
            in_channels=4,
            hidden_size=32,
            num_attention_heads=2,
            text_dim=16,
            num_layers=1,
            rope_dim_list=[4, 6, 6],
        )
    pipe = tiny_wan()
    return _quiet(
        JoyImageEditPlusPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=pipe.vae,
            text_encoder=text_encoder.eval(),
            tokenizer=processor.tokenizer,
            transformer=transformer.eval(),
            processor=processor,
        )
    )


def tiny_fibo2() -> BriaFibo2Pipeline:
    """FIBO 2 with a transformer of width 32 and an LLM of 16, whose images have 6084 pixels."""
    processor = image_text_processor(16)
    config = _qwen3_vl(len(processor.tokenizer), 2)
    config.image_token_id = processor.image_token_id
    with seeded():
        text_encoder = Qwen3VLForConditionalGeneration(config)
        transformer = BriaFibo2Transformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=5,
            n_refiner_layers=1,
            n_heads=2,
            cap_feat_dim=3 * 16,
            injection_layer_ids=(0, 1, 2, 3, 4),
            perceiver_num_layers=1,
            min_num_gist_tokens=4,
            max_num_gist_tokens=8,
            gist_step=4,
            gist_min_text_len=4,
            gist_max_text_len=64,
            axes_dims=(4, 6, 6),
            axes_lens=(2048, 64, 64),
        )
    pipe = BriaFibo2Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_flux2_klein().vae,
        text_encoder=text_encoder.eval(),
        processor=processor,
    )
    pipe.text_encoder_out_layers = ((0, 1, 2),) * 6
    pipe.default_sample_size = 39  # latents of 2 x 2 pixels
    return _quiet(pipe)


def _add_image_tokens(encoder: Any, processor: ImageTextProcessor) -> None:
    encoder.config.image_token_id = processor.image_token_id
    encoder.config.vision_start_token_id = processor.tokenizer.convert_tokens_to_ids(_START)
    encoder.resize_token_embeddings(len(processor.tokenizer))


def _parts(pipe: Any, *missing: str) -> dict[str, Any]:
    return dict(pipe.components) | dict.fromkeys(missing)


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe

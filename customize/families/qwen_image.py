"""Qwen-Image (arXiv 2508.02324): a multimodal transformer that reads a multimodal LLM's states.

The prompt is inserted into a chat template, whose tokens are removed after encoding. The LLM takes
no new tokens: a trigger is a plain word of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from customize.families.native_references import NativeReferences
from customize.families.pipeline_components import class_name
from customize.families.token_layout import PromptText
from customize.families.tokenization import pad_sequences, to_device, unpad_sequences
from customize.families.video_vae import QwenImageVAEFamily

#: How many tokens of the prompt the pipeline takes by default.
MAX_SEQUENCE_LENGTH = 512

_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity,"
    " text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}"
    "<|im_end|>\n<|im_start|>assistant\n"
)
_TEMPLATE_TOKENS = 34  # of the template before the prompt, by the model's tokenizer
_TOKENIZER_LENGTH = 1024


class QwenImage(QwenImageVAEFamily):
    """Qwen-Image.

    Components: QwenImageTransformer2DModel, a Qwen2.5-VL, AutoencoderKLQwenImage, and a
    flow-matching scheduler whose shift grows with the picture.
    """

    name = "qwen_image"
    native_references = (
        NativeReferences(
            model="Qwen-Image-Edit-Plus",
            pipelines=("QwenImageEditPlusPipeline",),
            blocks=("qwenimage-edit-plus",),
            prompts="one prompt",
            output_size="last",
            order='"Picture 1", "Picture 2", ... before the prompt',
            size_rule="resized to 384^2 pixels for the LLM and to 1024^2 for the autoencoder, also "
            "enlarged, with sides of multiples of 32",
            max_pixels=1024**2,
        ),
        NativeReferences(
            model="Qwen-Image-Edit",
            pipelines=("QwenImageEditPipeline",),
            blocks=("qwenimage-edit",),
            form="image",  # a list would be a batch
            limit=1,
            prompts="one prompt",
            output_size="first",
            order="one image",
            size_rule="resized to 1024^2 pixels, also enlarged, with sides of multiples of 32",
            max_pixels=1024**2,
        ),
    )
    default_guidance = 4.0
    kohya_uses_original_names = False
    attention_projections = re.compile(
        r"transformer_blocks\.\d+\.attn\."
        r"(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    )
    clip_encoders: ClassVar[dict[str, str]] = {}
    other_encoders = ("text_encoder",)
    attention_mask = "boolean"
    guidance_needs_negative_prompt = True
    token_kinds: ClassVar = {
        r"transformer_blocks\.\d+\.attn\.(add_(q|k|v)_proj|to_add_out)": "text",
        r"transformer_blocks\.\d+\.txt_mlp\..+|txt_in": "text",
        r"transformer_blocks\.\d+\.(attn|img_mlp)\..+|img_in|proj_out": "picture",
    }
    text_attention_kinds: ClassVar = {r"transformer_blocks\.\d+\.attn": ("to_q", "add_k_proj")}
    text_mask_argument = "encoder_hidden_states_mask"

    @classmethod
    def matches(cls, components: Mapping[str, Any]) -> bool:
        return class_name(components.get("transformer")) == "QwenImageTransformer2DModel"

    @classmethod
    def published_models(cls) -> list[dict[str, nn.Module]]:
        from diffusers import QwenImageTransformer2DModel

        return [{"transformer": QwenImageTransformer2DModel()}]

    def kohya_metadata(self) -> dict[str, str]:
        return {
            "ss_network_module": "networks.lora_qwen_image",
            "ss_base_model_version": "qwen_image",
            "modelspec.architecture": "Qwen-Image/lora",
            "modelspec.implementation": "https://github.com/QwenLM/Qwen-Image",
            "modelspec.resolution": "1024x1024",
        }

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        encoder = self._component("text_encoder")
        tokens = self._component("tokenizer")(
            [_TEMPLATE.format(prompt) for prompt in prompts],
            max_length=_TOKENIZER_LENGTH + _TEMPLATE_TOKENS,
            padding=True,
            truncation=True,
            return_tensors="pt",
        )
        states = encoder(
            input_ids=to_device(tokens.input_ids, encoder.device),
            attention_mask=to_device(tokens.attention_mask, encoder.device),
            output_hidden_states=True,
        ).hidden_states[-1]
        read = slice(_TEMPLATE_TOKENS, _TEMPLATE_TOKENS + self._length(MAX_SEQUENCE_LENGTH))
        rows = [row[read] for row in unpad_sequences(states, tokens.attention_mask)]
        masks = [torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows]
        return {
            "prompt_embeds": pad_sequences([row.to(encoder.dtype) for row in rows]),
            "prompt_embeds_mask": pad_sequences(masks),
        }

    def predict(
        self,
        noisy: Tensor,
        t: Tensor,
        conditions: Mapping[str, Tensor],
        guidance: float = 1.0,
    ) -> Tensor:
        self._check_channels(noisy)
        dtype = self._denoiser_dtype
        height, width = noisy.shape[-2:]
        answer = self.denoiser(
            hidden_states=self.pack(noisy.to(dtype)),
            timestep=t / self._train_timesteps,
            encoder_hidden_states=conditions["prompt_embeds"].to(dtype),
            encoder_hidden_states_mask=conditions["prompt_embeds_mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * len(noisy),
            return_dict=False,
        )[0]
        return self.unpack(answer, height, width)

    def denoiser_kwargs(self, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        mask = conditions["prompt_embeds_mask"]
        return super().denoiser_kwargs(conditions) | {"encoder_hidden_states_mask": mask}

    def latent_grid(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        first = arguments["img_shapes"][
            0
        ]  # shapes of reference pictures follow the generated one's
        _, rows, columns = first[0] if isinstance(first, list) else first
        return rows, columns

    def rotations(
        self, arguments: Mapping[str, Any], texts: int, grid: tuple[int, int, int]
    ) -> tuple[Tensor | None, Tensor | None]:
        picture, text = arguments["image_rotary_emb"]
        return picture, text

    def prompt_text(self, prompt: str) -> PromptText:
        return PromptText(
            self._component("tokenizer"),
            _TEMPLATE.format(prompt),
            -_TEMPLATE_TOKENS,
            self._length(MAX_SEQUENCE_LENGTH),
        )

    def apply_guidance(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        # Each token is rescaled to the norm of the conditional prediction.
        guided = self.pack(super().apply_guidance(unconditional, conditional, scale))
        length = self.pack(conditional).norm(dim=-1, keepdim=True)
        rescaled = guided * (length / guided.norm(dim=-1, keepdim=True))
        return self.unpack(rescaled, *conditional.shape[-2:])

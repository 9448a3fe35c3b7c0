"""Rewards without models, and small vision-language models with random weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    Idefics2Config,
    Idefics2Model,
    Idefics2PreTrainedModel,
    Idefics2Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from customize.evaluation.rewards import Picture
from customize.evaluation.rewards.aesthetic import HEAD_FILE
from customize.evaluation.rewards.frames import mean_over_frames
from tests.evaluation.making import pictures, save_clip, spread
from tests.tiny import qwen_tokenizer, seeded

PROMPTS = ["a photo of a dog", "a striped cat on the beach", "two red cups"]

#: Messages whose contents are images and texts.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: That of a model that thinks before it answers.
THINKING = TEMPLATE + "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"


class ColourReward:
    """The mean of a colour channel, from 0 to 1."""

    def __init__(self, channel: int = 0, name: str = "colour", digest: str = "") -> None:
        self.channel = channel
        self.name = name
        self.digest = digest or hashlib.sha256(f"{name} {channel}".encode()).hexdigest()

    def __call__(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> Tensor:
        return mean_over_frames(self._score, pictures, prompts)

    def _score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        means = [np.asarray(image)[..., self.channel].mean() / 255 for image in images]
        return torch.tensor(means, dtype=torch.float32)


def videos(count: int, frames: int) -> list[list[Image.Image]]:
    """Videos whose frames all differ."""
    return [pictures(frames, seed=10 + index) for index in range(count)]


def save_aesthetic(folder: Path) -> Path:
    """The small CLIP with a head."""
    save_clip(folder)
    with seeded():
        head = {"weight": torch.randn(1, 12), "bias": torch.randn(1)}
    save_file(head, folder / HEAD_FILE)
    return folder


def save_llava(folder: Path, template: str | None = TEMPLATE, tied: bool = False) -> Path:
    """A LLaVA for pictures of 24 x 24, with Qwen2 as its language model."""
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens("<image>", special_tokens=True)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlavaConfig(
        text_config={
            **layers,
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": tied,
        },
        vision_config={
            **layers,
            "model_type": "clip_vision_model",
            "num_attention_heads": 2,
            "image_size": 24,
            "patch_size": 8,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=tied,
    )
    with seeded():
        model = LlavaForConditionalGeneration(config)
        spread(model)
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return folder


class Idefics2ForSequenceClassification(Idefics2PreTrainedModel):
    """The class of mantis-vl 0.0.5, with keywords alone and transformers' own Idefics2."""

    def __init__(self, config: Idefics2Config) -> None:
        super().__init__(config)
        self.model = Idefics2Model(config)
        self.score = nn.Linear(config.text_config.hidden_size, config.num_labels)
        self.calls = 0
        self.post_init()

    def forward(
        self,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: object = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        image_hidden_states: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutputWithPast:
        self.calls += 1
        states = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            pixel_attention_mask=pixel_attention_mask,
        ).last_hidden_state
        return SequenceClassifierOutputWithPast(logits=self.score(states)[:, -1])


def save_video_score(folder: Path, labels: int = 5) -> Path:
    """A VideoScore of width 16 for frames of 28 x 28, and its text."""
    tokenizer = qwen_tokenizer()
    images = Idefics2ImageProcessorPil(
        size={"shortest_edge": 28, "longest_edge": 28}, do_image_splitting=False
    )
    processor = Idefics2Processor(images, tokenizer, image_seq_len=3)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = Idefics2Config(
        text_config={
            **layers,
            "model_type": "mistral",
            "vocab_size": len(tokenizer),
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "pad_token_id": 0,
        },
        vision_config={**layers, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        perceiver_config={
            "resampler_n_latents": 3,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        },
        image_token_id=processor.image_token_id,
        num_labels=labels,
        tie_word_embeddings=False,
    )
    with seeded():
        model = Idefics2ForSequenceClassification(config)
        spread(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "query.txt").write_text('the prompt is "{text_prompt}", the frames:\n')
    return folder

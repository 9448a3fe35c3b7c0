"""Questions to a vision-language model: the probability of "yes" against "no"."""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from customize.core.precision import full_precision
from customize.errors import ConfigError, PipelineError
from customize.evaluation.rewards.frames import FRAMES, check_pictures, sample_frames
from customize.evaluation.rewards.reward import Picture, RewardKind, weights_digest
from customize.evaluation.rewards.special_tokens import remove_special_tokens
from customize.evaluation.scorer_models import load_model, load_pretrained
from customize.text import quote

#: The question about each picture.
QUESTION = "Does this image show: {prompt}? Answer yes or no."


class YesNoReward:
    """Probability of "yes" against "no" as the first token of a model's answer, in [0, 1].

    Args:
        model: Folder or hub id of a transformers image-text-to-text model with a processor that has
            a chat template. It is loaded in float32 on the CPU, and elsewhere in its file's dtype.
        device: Device that the model runs on.
        question: The question; `{prompt}` is replaced by the prompt. Another one than
            :data:`QUESTION` is part of the reward's name.

    Raises:
        ConfigError: The question has placeholders other than `{prompt}`.
        PipelineError: The model cannot be loaded, is no image-text-to-text model, lacks weights or
            a chat template, or its tokenizer begins "yes" and "no" by the same token.
    """

    def __init__(
        self, model: str | Path, device: str | torch.device = "cpu", question: str = QUESTION
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as TYPES,
        )

        _check_question(question)
        kind = "vision-language"
        self.name = "yes_no" if question == QUESTION else f"yes_no:{question}"
        self.question = question
        self.model = load_model(
            AutoModelForImageTextToText,
            model,
            kind,
            list(TYPES),
            dtype=torch.float32 if torch.device(device).type == "cpu" else "auto",
        ).to(device)
        self.processor = load_pretrained(AutoProcessor, model, f"the {kind} model's processor")
        template = getattr(self.processor, "chat_template", None)
        if not template or not hasattr(self.processor, "image_processor"):
            raise PipelineError(
                f"the processor has no {'image processor' if template else 'chat template'}",
                where=model,
                fix="give an instruction-tuned model, such as Qwen/Qwen2-VL-2B-Instruct",
            )
        # Models that think before they answer have a switch in their templates.
        thinks = "enable_thinking" in str(template)
        self.template_settings = {"enable_thinking": False} if thinks else {}
        self.yes, self.no = _answer_tokens(self.processor.tokenizer, model)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return weights_digest(self.model)

    @full_precision(tf32=True)
    @torch.no_grad()
    def __call__(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> Tensor:
        """Scores (n,); the frames of a video are images of one question."""
        videos = check_pictures(pictures, prompts)
        return torch.stack(
            [
                self._score(sample_frames(frames, FRAMES), prompt)
                for frames, prompt in zip(videos, prompts, strict=True)
            ]
        )

    def _score(self, images: list[Image.Image], prompt: str) -> Tensor:
        """Probability (), float32, on the CPU."""
        question = self.question.format(prompt=remove_special_tokens(prompt, self.processor))
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **self.template_settings,
        )
        answer = self.model.generate(
            **inputs.to(self.model.device, self.model.dtype),
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = answer.logits[0][0].float().cpu()
        return (logits[self.yes].logsumexp(0) - logits[self.no].logsumexp(0)).sigmoid()


def _check_question(question: str) -> None:
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(question)} - {None}
    except (TypeError, ValueError):
        fields = {"?"}
    if not fields <= {"prompt"}:
        raise ConfigError(
            f"the question {quote(question)} has placeholders other than {{prompt}}",
            where="question",
            fix=f"write for example {quote(QUESTION)}",
        )


def _answer_tokens(tokenizer: Any, model: str | Path) -> tuple[list[int], list[int]]:
    """First tokens of the spellings of "yes" and "no", without those that both begin with."""
    yes, no = (
        {
            tokens[0]
            for spelling in (word, word.capitalize(), word.upper())
            for text in (spelling, f" {spelling}")
            if (tokens := tokenizer.encode(text, add_special_tokens=False))
        }
        - {tokenizer.unk_token_id}
        for word in ("yes", "no")
    )
    if not yes - no or not no - yes:
        raise PipelineError(
            'the tokenizer does not tell the beginnings of "yes" and "no" apart',
            where=model,
            fix="give another model",
        )
    return sorted(yes - no), sorted(no - yes)


YES_NO = RewardKind(
    name="yes_no",
    measures='probability of "yes" to the question whether the picture shows the prompt',
    load=YesNoReward,
    model="Qwen/Qwen2-VL-2B-Instruct",
    needs="torchvision",
)

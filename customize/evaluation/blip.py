"""BLIP and BLIP-2 scores of an image and its prompt: contrastive (ITC) and matching (ITM).

ITC is the cosine of the image and prompt embeddings. ITM is the probability that they match, by a
classifier with cross-attention between the two.

BLIP2-T of ClassDiffusion (arXiv:2405.17532) is `blip_itc`: its published code loads the BLIP model
Salesforce/blip-itm-large-coco and computes the cosine. Prompts begin with [CLS] for both scores, as
in transformers and in BLIP's example; LAVIS begins those for BLIP's ITM with [ENC], which the
published tokenizers lack. Triggers should be replaced by the class word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from customize.core.precision import full_precision
from customize.errors import ConfigError
from customize.evaluation.scorer_models import (
    load_model,
    load_pretrained,
    pixel_batches,
    split_batches,
)
from customize.text import plural


@dataclass(frozen=True)
class _Preprocessor:
    """Preprocesses pairs of an image and a prompt."""

    processor: Any
    tokenizer: Any
    max_length: int
    device: str | torch.device

    def pairs(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield pixels, token ids and attention mask in batches."""
        if len(images) != len(prompts):
            raise ConfigError(
                f"{plural(len(prompts), 'prompt')} for {plural(len(images), 'image')}",
                fix="give one prompt per image",
            )
        pixels = pixel_batches(self.processor, images, self.device)
        for part, texts in zip(pixels, split_batches(prompts), strict=True):
            text = self.tokenizer(
                texts,
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.device)
            yield part, text["input_ids"], text["attention_mask"]


def _load_preprocessor(
    model: str | Path, kind: str, positions: int, device: str | torch.device
) -> _Preprocessor:
    from transformers import AutoImageProcessor, AutoTokenizer

    # Not AutoProcessor: BLIP-2's inserts image placeholders into the text.
    tokenizer = load_pretrained(AutoTokenizer, model, f"the {kind} model's tokenizer")
    return _Preprocessor(
        load_pretrained(AutoImageProcessor, model, f"the {kind} model's image processor"),
        tokenizer,
        min(tokenizer.model_max_length, positions),
        device,
    )


class BlipScorer:
    """Computes `blip_itc` and `blip_itm` with a BLIP model for image-text retrieval.

    Args:
        model: Folder or hub id of a transformers BlipForImageTextRetrieval with its processor,
            such as Salesforce/blip-itm-base-coco.
        device: Device that the model runs on.

    Raises:
        PipelineError: The model cannot be loaded, is another model (a captioner lacks the heads),
            or lacks weights.
    """

    def __init__(self, model: str | Path, device: str | torch.device = "cpu") -> None:
        from transformers import BlipForImageTextRetrieval

        kind = "BLIP image-text retrieval"
        self.model = load_model(BlipForImageTextRetrieval, model, kind, ("blip",)).to(device)
        positions = self.model.config.text_config.max_position_embeddings
        self.preprocessor = _load_preprocessor(model, kind, positions, device)

    @full_precision(tf32=True)
    @torch.no_grad()
    def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score n images with their prompts, which are truncated to the model's maximum length.

        Returns:
            `blip_itc` in [-1, 1] and `blip_itm` in [0, 1], (n,) each, float32, on the CPU.

        Raises:
            ConfigError: The numbers of images and prompts differ.
        """
        model, itc, itm = self.model, [], []
        for part, ids, mask in self.preprocessor.pairs(images, prompts):
            image_features = model.vision_model(pixel_values=part).last_hidden_state
            text = {"input_ids": ids, "attention_mask": mask}
            text_features = model.text_encoder(**text).last_hidden_state
            joint = model.text_encoder(
                **text, encoder_hidden_states=image_features
            ).last_hidden_state
            itc.append(
                F.cosine_similarity(
                    model.vision_proj(image_features[:, 0]), model.text_proj(text_features[:, 0])
                )
            )
            itm.append(_matching(model.itm_head(joint[:, 0])))
        return {"blip_itc": torch.cat(itc).cpu(), "blip_itm": torch.cat(itm).cpu()}


class Blip2Scorer:
    """Computes `blip2_itc` and `blip2_itm` with a BLIP-2 model for image-text retrieval.

    Args:
        model: Folder or hub id of a transformers Blip2ForImageTextRetrieval with its processor,
            such as Salesforce/blip2-itm-vit-g.
        device: Device that the model runs on.

    Raises:
        PipelineError: The model cannot be loaded, is another model (one with a language model
            lacks the heads), or lacks weights.
    """

    def __init__(self, model: str | Path, device: str | torch.device = "cpu") -> None:
        from transformers import Blip2ForImageTextRetrieval

        kind = "BLIP-2 image-text retrieval"
        self.model = load_model(Blip2ForImageTextRetrieval, model, kind, ("blip-2",)).to(device)
        positions = self.model.config.qformer_config.max_position_embeddings
        self.preprocessor = _load_preprocessor(model, kind, positions, device)

    @full_precision(tf32=True)
    @torch.no_grad()
    def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score n images with their prompts, which are truncated to the model's maximum length.

        ITC is the highest cosine of a query with the prompt; ITM averages the logits over queries.

        Returns:
            `blip2_itc` in [-1, 1] and `blip2_itm` in [0, 1], (n,) each, float32, on the CPU.

        Raises:
            ConfigError: The numbers of images and prompts differ.
        """
        model, itc, itm = self.model, [], []
        for part, ids, mask in self.preprocessor.pairs(images, prompts):
            image_features = model.vision_model(pixel_values=part).last_hidden_state
            queries = model.query_tokens.expand(len(image_features), -1, -1)
            count = queries.shape[1]
            query_features = model.qformer(
                query_embeds=queries, encoder_hidden_states=image_features
            )
            text_features = model.qformer(
                query_embeds=model.embeddings(input_ids=ids), query_length=0, attention_mask=mask
            )
            joint = model.qformer(
                query_embeds=model.embeddings(input_ids=ids, query_embeds=queries),
                query_length=count,
                attention_mask=torch.cat([mask.new_ones(len(mask), count), mask], dim=1),
                encoder_hidden_states=image_features,
            )
            cosines = F.cosine_similarity(
                model.vision_projection(query_features.last_hidden_state),
                model.text_projection(text_features.last_hidden_state[:, :1]),
                dim=-1,
            )
            itc.append(cosines.amax(1))
            itm.append(_matching(model.itm_head(joint.last_hidden_state[:, :count]).mean(1)))
        return {"blip2_itc": torch.cat(itc).cpu(), "blip2_itm": torch.cat(itm).cpu()}


def _matching(logits: Tensor) -> Tensor:
    """Probabilities (n,) from logits (n, 2) of "does not match" and "matches"."""
    return logits.softmax(-1)[:, 1]

"""BLIP and BLIP-2: how well a prompt describes its picture, each in two ways.

ITC, contrastive: the cosine of picture and prompt, which are read apart. ITM, matching: the
probability that they belong together, by a head that has read one in the light of the other.

What ClassDiffusion (arXiv 2405.17532) reports as BLIP2-T is `blip_itc`: its published code loads
Salesforce/blip-itm-large-coco, a BLIP model, and takes the cosine. Prompts begin with [CLS] in
both, as in transformers' classes and in BLIP's own example; LAVIS begins BLIP's ITM with a token
[ENC], which the published tokenizers don't have. Triggers should be replaced by the class word.
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


@dataclass(frozen=True)
class _Reader:
    """Turns pairs of a picture and a prompt into a model's inputs."""

    processor: Any
    tokenizer: Any
    longest: int
    device: str | torch.device

    def pairs(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Pixels, token ids and attention mask, a batch at a time."""
        if len(pictures) != len(prompts):
            raise ConfigError(
                f"there are {len(prompts)} prompts for {len(pictures)} pictures",
                fix="give one for each picture",
            )
        seen = pixel_batches(self.processor, pictures, self.device)
        for part, said in zip(seen, split_batches(prompts), strict=True):
            text = self.tokenizer(
                said,
                padding=True,
                truncation=True,
                max_length=self.longest,
                return_tensors="pt",
            ).to(self.device)
            yield part, text["input_ids"], text["attention_mask"]


def _reader(model: str | Path, kind: str, positions: int, device: str | torch.device) -> _Reader:
    from transformers import AutoImageProcessor, AutoTokenizer

    # Not AutoProcessor: BLIP-2's puts places for the picture into the text, to be taken out again.
    tokenizer = load_pretrained(AutoTokenizer, model, f"the {kind} model's tokenizer")
    return _Reader(
        load_pretrained(AutoImageProcessor, model, f"the {kind} model's image processor"),
        tokenizer,
        min(tokenizer.model_max_length, positions),
        device,
    )


class BlipScorer:
    """`blip_itc` and `blip_itm` from a BLIP model for image-text retrieval.

    Args:
        model: folder or hub id of a transformers BlipForImageTextRetrieval with its processor,
            such as Salesforce/blip-itm-base-coco.

    Raises:
        PipelineError: it is not there, not such a model (a captioner lacks its heads), or not
            whole.
    """

    def __init__(self, model: str | Path, device: str | torch.device = "cpu") -> None:
        from transformers import BlipForImageTextRetrieval

        kind = "BLIP image-text retrieval"
        self.model = load_model(BlipForImageTextRetrieval, model, kind, ("blip",)).to(device)
        positions = self.model.config.text_config.max_position_embeddings
        self.reader = _reader(model, kind, positions, device)

    @full_precision(tf32=True)
    @torch.no_grad()
    def scores(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Tensor]:
        """`blip_itc` in [-1, 1] and `blip_itm` in [0, 1] of each picture with its prompt.

        Returns:
            (n,) each, float32, on the CPU. Prompts longer than the model reads are cut.

        Raises:
            ConfigError: not as many prompts as pictures.
        """
        model, itc, itm = self.model, [], []
        for part, ids, mask in self.reader.pairs(pictures, prompts):
            seen = model.vision_model(pixel_values=part).last_hidden_state
            text = {"input_ids": ids, "attention_mask": mask}
            said = model.text_encoder(**text).last_hidden_state
            both = model.text_encoder(**text, encoder_hidden_states=seen).last_hidden_state
            itc.append(
                F.cosine_similarity(model.vision_proj(seen[:, 0]), model.text_proj(said[:, 0]))
            )
            itm.append(_matching(model.itm_head(both[:, 0])))
        return {"blip_itc": torch.cat(itc).cpu(), "blip_itm": torch.cat(itm).cpu()}


class Blip2Scorer:
    """`blip2_itc` and `blip2_itm` from a BLIP-2 model for image-text retrieval.

    Args:
        model: folder or hub id of a transformers Blip2ForImageTextRetrieval with its processor,
            such as Salesforce/blip2-itm-vit-g.

    Raises:
        PipelineError: it is not there, not such a model (one with a language model lacks its
            heads), or not whole.
    """

    def __init__(self, model: str | Path, device: str | torch.device = "cpu") -> None:
        from transformers import Blip2ForImageTextRetrieval

        kind = "BLIP-2 image-text retrieval"
        self.model = load_model(Blip2ForImageTextRetrieval, model, kind, ("blip-2",)).to(device)
        positions = self.model.config.qformer_config.max_position_embeddings
        self.reader = _reader(model, kind, positions, device)

    @full_precision(tf32=True)
    @torch.no_grad()
    def scores(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Tensor]:
        """`blip2_itc` in [-1, 1] and `blip2_itm` in [0, 1] of each picture with its prompt.

        ITC is the cosine of the query that comes closest to the prompt; ITM is by the mean over
        queries of the head's two logits.

        Returns:
            (n,) each, float32, on the CPU. Prompts longer than the model reads are cut.

        Raises:
            ConfigError: not as many prompts as pictures.
        """
        model, itc, itm = self.model, [], []
        for part, ids, mask in self.reader.pairs(pictures, prompts):
            seen = model.vision_model(pixel_values=part).last_hidden_state
            queries = model.query_tokens.expand(len(seen), -1, -1)
            count = queries.shape[1]
            asked = model.qformer(query_embeds=queries, encoder_hidden_states=seen)
            said = model.qformer(
                query_embeds=model.embeddings(input_ids=ids), query_length=0, attention_mask=mask
            )
            both = model.qformer(
                query_embeds=model.embeddings(input_ids=ids, query_embeds=queries),
                query_length=count,
                attention_mask=torch.cat([mask.new_ones(len(mask), count), mask], dim=1),
                encoder_hidden_states=seen,
            )
            cosines = F.cosine_similarity(
                model.vision_projection(asked.last_hidden_state),
                model.text_projection(said.last_hidden_state[:, :1]),
                dim=-1,
            )
            itc.append(cosines.amax(1))
            itm.append(_matching(model.itm_head(both.last_hidden_state[:, :count]).mean(1)))
        return {"blip2_itc": torch.cat(itc).cpu(), "blip2_itm": torch.cat(itm).cpu()}


def _matching(logits: Tensor) -> Tensor:
    """Probabilities (n,) from logits (n, 2) of "does not match" and "matches"."""
    return logits.softmax(-1)[:, 1]

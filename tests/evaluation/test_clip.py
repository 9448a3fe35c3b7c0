"""CLIP-T and CLIP-I against plain computations with the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from customize.evaluation.clip import ClipScorer
from tests.evaluation.making import pictures, pixels, save_clip

PROMPTS = ["a photo of a dog", "a striped cat on the beach", "two red cups"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@torch.no_grad()
def test_clip_by_hand(clip: Path) -> None:
    images, references = pictures(3), pictures(2, seed=1)
    model = CLIPModel.from_pretrained(clip).eval()
    tokens = AutoTokenizer.from_pretrained(clip)(PROMPTS, padding=True, return_tensors="pt")

    def shown(some: list[Image.Image]) -> torch.Tensor:
        pooled = model.vision_model(pixel_values=pixels(clip, some)).pooler_output
        return model.visual_projection(pooled)

    text_features = model.text_projection(model.text_model(**tokens).pooler_output)
    scorer = ClipScorer(clip)
    clip_t = scorer.clip_t(images, PROMPTS)
    torch.testing.assert_close(clip_t, F.cosine_similarity(shown(images), text_features))
    pairs = F.cosine_similarity(shown(images)[:, None], shown(references)[None], dim=-1)
    torch.testing.assert_close(scorer.clip_i(images, references), pairs.mean(1))
    assert clip_t.std() > 1e-3 and pairs.std() > 1e-3


def test_an_image_equals_itself(clip: Path) -> None:
    images = pictures(1)
    torch.testing.assert_close(ClipScorer(clip).clip_i(images, images), torch.ones(1))


def test_long_prompts_are_truncated(clip: Path) -> None:
    scorer = ClipScorer(clip)
    long = "a photo of " + "a dog and " * 40
    torch.testing.assert_close(scorer.embed_texts([long]), scorer.embed_texts([long + "a cat"]))

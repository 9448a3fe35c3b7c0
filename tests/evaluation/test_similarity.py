"""CLIP-T, CLIP-I and DINO-I against plain computations with the same models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Dinov2Model

from customize.errors import PipelineError
from customize.evaluation import similarity
from customize.evaluation.similarity import ClipScorer, DinoScorer
from tests.evaluation.making import save_clip, save_dino

PROMPTS = ["a photo of a dog", "a striped cat on the beach", "two red cups"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dino(tmp_path_factory.mktemp("dino"))


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Smooth pictures of odd sizes, all different."""
    rng = np.random.default_rng(seed)
    return [
        Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((50 + k, 40))
        for k in range(count)
    ]


def pixels(folder: Path, images: list[Image.Image]) -> torch.Tensor:
    return AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def test_clip_by_hand(clip: Path) -> None:
    images, references = pictures(3), pictures(2, seed=1)
    model = CLIPModel.from_pretrained(clip).eval()
    tokens = AutoTokenizer.from_pretrained(clip)(PROMPTS, padding=True, return_tensors="pt")

    def shown(some: list[Image.Image]) -> torch.Tensor:
        pooled = model.vision_model(pixel_values=pixels(clip, some)).pooler_output
        return model.visual_projection(pooled)

    said = model.text_projection(model.text_model(**tokens).pooler_output)
    scorer = ClipScorer(clip)
    clip_t = scorer.clip_t(images, PROMPTS)
    torch.testing.assert_close(clip_t, F.cosine_similarity(shown(images), said))
    pairs = F.cosine_similarity(shown(images)[:, None], shown(references)[None], dim=-1)
    torch.testing.assert_close(scorer.clip_i(images, references), pairs.mean(1))
    assert clip_t.std() > 1e-3 and pairs.std() > 1e-3


@torch.no_grad()
def test_dino_by_hand(dino: Path) -> None:
    images, references = pictures(3), pictures(2, seed=1)
    model = Dinov2Model.from_pretrained(dino).eval()

    def seen(some: list[Image.Image]) -> torch.Tensor:
        return model(pixel_values=pixels(dino, some)).pooler_output  # the normed class token

    pairs = F.cosine_similarity(seen(images)[:, None], seen(references)[None], dim=-1)
    torch.testing.assert_close(DinoScorer(dino).dino_i(images, references), pairs.mean(1))
    assert pairs.std() > 1e-3


def test_a_picture_is_like_itself(clip: Path, dino: Path) -> None:
    for scorer in (ClipScorer(clip).clip_i, DinoScorer(dino).dino_i):
        images = pictures(1)
        torch.testing.assert_close(scorer(images, images), torch.ones(1))


def test_batches_change_nothing(clip: Path, dino: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, prompts = pictures(5), PROMPTS + PROMPTS[:2]
    before = [ClipScorer(clip).clip_t(images, prompts), DinoScorer(dino).images(images)]
    monkeypatch.setattr(similarity, "BATCH", 2)
    after = [ClipScorer(clip).clip_t(images, prompts), DinoScorer(dino).images(images)]
    torch.testing.assert_close(before, after)


def test_prompts_longer_than_clip_reads_are_cut(clip: Path) -> None:
    scorer = ClipScorer(clip)
    long = "a photo of " + "a dog and " * 40
    torch.testing.assert_close(scorer.texts([long]), scorer.texts([long + "a cat"]))


def test_other_models_are_refused(clip: Path, dino: Path, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="of type dinov2, not a CLIP model"):
        ClipScorer(dino)
    with pytest.raises(PipelineError, match=r"of type clip, not a DINO model.*dinov2"):
        DinoScorer(clip)
    with pytest.raises(PipelineError, match="the CLIP model cannot be loaded"):
        ClipScorer(tmp_path)


def test_weights_are_never_made_up(dino: Path, tmp_path: Path) -> None:
    """transformers would fill them in at random, and say so in a log alone."""
    for file in dino.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(dino / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PipelineError, match=r"lacks 1 weights, such as layernorm\.weight"):
        DinoScorer(tmp_path)


def test_pickles_are_not_read(dino: Path, tmp_path: Path) -> None:
    for file in dino.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(dino / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(PipelineError, match="cannot be loaded"):
        DinoScorer(tmp_path)

"""Shared by all scorers: complete models only, and independence of batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel

from customize.errors import PipelineError
from customize.evaluation import scorer_models
from customize.evaluation.blip import Blip2Scorer, BlipScorer
from customize.evaluation.clip import ClipScorer
from customize.evaluation.dino import DinoScorer
from tests.evaluation.making import pictures, save_blip, save_blip2, save_clip, save_dino

PROMPTS = ["a photo of a dog", "a striped cat on the beach", "two red cups"]
SAVE: dict[str, Callable[[Path], Path]] = {
    "clip": save_clip,
    "dino": save_dino,
    "blip": save_blip,
    "blip2": save_blip2,
}
SCORERS = {"clip": ClipScorer, "dino": DinoScorer, "blip": BlipScorer, "blip2": Blip2Scorer}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save(root / name) for name, save in SAVE.items()}


def scores(name: str, model: Path, count: int = 5) -> list[Tensor]:
    images, prompts = pictures(count), (PROMPTS * 2)[:count]
    scorer = SCORERS[name](model)
    if isinstance(scorer, ClipScorer):
        return [scorer.clip_t(images, prompts), scorer.clip_i(images, images)]
    if isinstance(scorer, DinoScorer):
        return [scorer.dino_i(images, images)]
    return list(scorer.scores(images, prompts).values())


@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_independent_of_batches(
    name: str, saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = scores(name, saved[name])
    assert all(actual.shape == (5,) and actual.std() > 1e-3 for actual in before)
    monkeypatch.setattr(scorer_models, "BATCH_SIZE", 2)
    torch.testing.assert_close(scores(name, saved[name]), before)


@pytest.mark.parametrize("name", SCORERS)
def test_half_precision_files_are_loaded_in_float32(
    name: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    copied(saved[name], tmp_path, lambda weights: {k: w.half() for k, w in weights.items()})
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"float32"', '"float16"'))
    for actual, expected in zip(scores(name, tmp_path), scores(name, saved[name]), strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("name", "other", "messages"),
    [
        ("clip", "dino", "of type dinov2, not a CLIP model"),
        ("dino", "clip", "of type clip, not a DINO model.*dinov2"),
        ("blip", "blip2", "of type blip-2, not a BLIP image-text retrieval model"),
        ("blip2", "blip", "of type blip, not a BLIP-2 image-text retrieval model"),
    ],
)
def test_other_models_are_refused(
    name: str, other: str, messages: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(PipelineError, match=messages):
        SCORERS[name](saved[other])
    with pytest.raises(PipelineError, match="model cannot be loaded"):
        SCORERS[name](tmp_path)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("clip", "visual_projection.weight"),
        ("dino", "layernorm.weight"),
        ("blip", "itm_head.weight"),
        ("blip2", "query_tokens"),
    ],
)
def test_missing_weights_are_refused(
    name: str, key: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    """transformers would fill them in at random, and say so in a log alone."""
    copied(saved[name], tmp_path, lambda weights: {k: w for k, w in weights.items() if k != key})
    with pytest.raises(PipelineError, match=rf"lacks 1 weight, such as {key}"):
        SCORERS[name](tmp_path)


def test_unused_weights_may_be_missing(saved: dict[str, Path], tmp_path: Path) -> None:
    """Such as the pooler of plain ViTs; and what is there besides is left alone."""
    (tmp_path / "more").mkdir()
    more = {"text_encoder.embeddings.position_ids": torch.arange(24)[None]}
    copied(saved["blip"], tmp_path / "more", lambda weights: weights | more)
    torch.testing.assert_close(scores("blip", tmp_path / "more"), scores("blip", saved["blip"]))
    loaded = scorer_models.load_model(
        CLIPModel, saved["clip"], "CLIP", ("clip",), unused=("visual_projection.",)
    )
    (tmp_path / "less").mkdir()
    copied(
        saved["clip"],
        tmp_path / "less",
        lambda weights: {k: w for k, w in weights.items() if k != "visual_projection.weight"},
    )
    less = scorer_models.load_model(
        CLIPModel, tmp_path / "less", "CLIP", ("clip",), unused=("visual_projection.",)
    )
    assert torch.equal(less.text_projection.weight, loaded.text_projection.weight)


def test_pickles_are_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    for file in saved["dino"].iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(saved["dino"] / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(PipelineError, match="cannot be loaded"):
        DinoScorer(tmp_path)


def copied(
    model: Path, folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    """A model's folder with other weights."""
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = change(load_file(model / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

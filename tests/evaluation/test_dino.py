"""DINO-I against a plain computation with the same model."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Dinov2Model

from customize.evaluation.dino import DinoScorer
from tests.evaluation.making import pictures, pixels, save_dino


@torch.no_grad()
def test_dino_by_hand(tmp_path: Path) -> None:
    dino = save_dino(tmp_path)
    images, references = pictures(3), pictures(2, seed=1)
    model = Dinov2Model.from_pretrained(dino).eval()

    def seen(some: list[Image.Image]) -> torch.Tensor:
        return model(pixel_values=pixels(dino, some)).pooler_output  # the normed class token

    pairs = F.cosine_similarity(seen(images)[:, None], seen(references)[None], dim=-1)
    scorer = DinoScorer(dino)
    torch.testing.assert_close(scorer.dino_i(images, references), pairs.mean(1))
    assert pairs.std() > 1e-3
    torch.testing.assert_close(scorer.dino_i(images[:1], images[:1]), torch.ones(1))

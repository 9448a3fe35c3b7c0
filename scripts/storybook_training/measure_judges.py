"""Measure the judges on held-out scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from customize.storybook.judges import HEADS, Judges
from customize.storybook.world import random_scene

from .judge_data import SEED, draw_pixels, identity_views, labels, roughen


def auc(positive: Tensor, negative: Tensor) -> float:
    """Area under the ROC curve: P(a positive distance is below a negative one).

    Args:
        positive: distances (n,) to the same identity.
        negative: distances (m,) to other identities.
    """
    order = torch.cat([positive, negative]).argsort().argsort().float() + 1
    low = len(positive) * (len(positive) + 1) / 2
    return 1 - ((order[: len(positive)].sum() - low) / (len(positive) * len(negative))).item()


def equal_error_threshold(positive: Tensor, negative: Tensor) -> float:
    """The threshold at which as large a share of positives exceeds it as negatives do not."""
    candidates = torch.cat([positive, negative]).sort().values
    gap = [
        ((positive > c).float().mean() - (negative <= c).float().mean()).abs() for c in candidates
    ]
    return candidates[int(torch.stack(gap).argmin())].item()


@torch.no_grad()
def measure_judges(
    judges: Judges, vae: AutoencoderKL | None, pictures: int = 1000, identities: int = 200
) -> dict[str, float]:
    """Measure attribute accuracy, identity AUC and threshold on held-out scenes.

    Negatives of the AUC are other identities of the same class.
    """
    rng = np.random.default_rng(SEED + 2)
    scenes = [random_scene(rng, two=0.45) for _ in range(pictures)]
    clean = draw_pixels(scenes).float() / 127.5 - 1
    generator = torch.Generator().manual_seed(SEED + 2)
    rough = torch.cat([roughen(part, generator, vae) for part in clean.split(120)])
    figures: dict[str, float] = {}
    for name, images in (("clean", clean), ("rough", rough)):
        logits = {k: torch.cat([judges.attributes(p)[k] for p in images.split(200)]) for k in HEADS}
        hits = []
        for head in HEADS:
            target = torch.tensor([labels(s)[head] for s in scenes])
            hit = (logits[head].argmax(1) == target)[target >= 0].float()
            figures[f"{name}_{head}"] = hit.mean().item()
            hits.append(hit)
        figures[f"{name}_accuracy"] = torch.cat(hits).mean().item()
    crops, classes = identity_views(np.random.default_rng(SEED + 3), identities, 12)
    crops = crops.float() / 127.5 - 1
    crops[:, 6:] = torch.stack([roughen(part, generator, vae) for part in crops[:, 6:]])
    vectors = judges.identity(crops.flatten(0, 1)).view(identities, 12, -1)
    # As concepts are judged: five clean references against one image.
    signatures = F.normalize(vectors[:, [0, 1, 2, 4, 5]].mean(1), dim=1)
    distance = 1 - torch.einsum("qvd,sd->sqv", vectors[:, 6:], signatures)
    same_class = torch.tensor([[a == b for b in classes] for a in classes])
    same_identity = torch.eye(identities, dtype=torch.bool)
    positive, negative = (
        distance[same_identity].flatten(),
        distance[same_class & ~same_identity].flatten(),
    )
    figures["identity_auc"] = auc(positive, negative)
    figures["threshold"] = equal_error_threshold(positive, negative)
    figures["equal_error"] = (positive > figures["threshold"]).float().mean().item()
    return figures


def draw_nearest(judges: Judges, path: Path) -> None:
    """Save a sheet of 16 identities, each above the nearest other identity."""
    crops, _ = identity_views(np.random.default_rng(SEED + 9), 64, 1)
    vectors = judges.identity(crops[:, 0].float() / 127.5 - 1)
    distance = (1 - vectors @ vectors.T).fill_diagonal_(9)
    sheet = Image.new("RGB", (16 * 66, 2 * 66), "white")
    for k in range(16):
        for row, index in enumerate((k, int(distance[k].argmin()))):
            sheet.paste(
                Image.fromarray(crops[index, 0].permute(1, 2, 0).numpy()), (k * 66, row * 66)
            )
    sheet.save(path)

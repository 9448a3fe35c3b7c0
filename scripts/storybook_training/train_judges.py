"""Train the judges on drawn scenes, measure them on held-out ones, and write them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from customize.storybook.judges import HEADS, AttributeJudge, IdentityJudge, Judges
from customize.storybook.world import CLASSES, random_scene

from .fit_judge import fit_judge, read_figures, write_judges
from .judge_data import SEED, draw_pixels, identity_views, labels, roughen
from .measure_judges import draw_nearest, measure_judges


def train_attributes(
    folder: Path, vae: AutoencoderKL | None, pictures: int, steps: int
) -> AttributeJudge:
    """Train the attribute judge on `pictures` drawn scenes, 45 % of them with two things."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    scenes = [random_scene(rng, two=0.45) for _ in range(pictures)]
    pool = draw_pixels(scenes)
    targets = {name: torch.tensor([labels(s)[name] for s in scenes]) for name in HEADS}
    model = AttributeJudge()

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pool), (64,), generator=generator)
        logits = model(roughen(pool[rows].float() / 127.5 - 1, generator, vae))
        losses = [
            F.cross_entropy(
                logits[name], targets[name][rows], ignore_index=-1, label_smoothing=0.02
            )
            for name in HEADS
        ]
        return torch.stack(losses).mean()

    fit_judge("attributes", folder, model, loss_of, steps, 2e-3, SEED)
    return model


def train_identity(
    folder: Path, vae: AutoencoderKL | None, identities: int, steps: int
) -> IdentityJudge:
    """Train the identity judge with a supervised contrastive loss (arXiv:2004.11362).

    Each batch has two classes only, so that negatives are hard.
    """
    torch.manual_seed(SEED + 1)
    crops, _ = identity_views(np.random.default_rng(SEED + 1), identities, 8)
    model = IdentityJudge()
    per_batch_class, views_shown = 16, 4

    def loss_of(generator: torch.Generator) -> Tensor:
        classes = torch.randperm(len(CLASSES), generator=generator)[:2]
        per_class = identities // len(CLASSES)
        rows = torch.cat(
            [
                torch.randperm(per_class, generator=generator)[:per_batch_class] * len(CLASSES) + k
                for k in classes
            ]
        )
        views = torch.stack([torch.randperm(8, generator=generator)[:views_shown] for _ in rows])
        batch = crops[rows[:, None], views].flatten(0, 1).float() / 127.5 - 1
        order = torch.randperm(len(batch), generator=generator)
        batch = torch.empty_like(batch).index_copy_(0, order, roughen(batch[order], generator, vae))
        vectors = model(batch)
        same = torch.arange(len(rows)).repeat_interleave(views_shown)
        similarity = vectors @ vectors.T / 0.1
        similarity.fill_diagonal_(float("-inf"))
        positive = (same[:, None] == same[None]) & ~torch.eye(len(same), dtype=torch.bool)
        return -similarity.log_softmax(1)[positive].mean()

    fit_judge("identity", folder, model, loss_of, steps, 2e-3, SEED)
    return model


def train_judges(
    folder: Path,
    vae: AutoencoderKL | None,
    pictures: int = 16_000,
    identities: int = 1_600,
    steps: int = 2_000,
) -> dict[str, float]:
    """Train both judges, write them to a folder and return their held-out figures.

    Resumes an interrupted training, and only reads the figures of a finished one.
    """
    finished = read_figures(folder)
    if finished is not None:
        return finished
    folder.mkdir(parents=True, exist_ok=True)
    judges = Judges(
        train_attributes(folder, vae, pictures, steps),
        train_identity(folder, vae, identities, steps // 2),
        threshold=0.0,
    )
    figures = measure_judges(judges, vae)
    draw_nearest(judges, folder / "nearest.png")
    save_judges(replace(judges, threshold=figures["threshold"]), folder, figures)
    return figures


def save_judges(judges: Judges, folder: Path, figures: dict[str, float]) -> None:
    """Write both judges in float16 for `load_judges`, with their held-out figures."""
    nets = {"attributes": judges.attributes, "identity": judges.identity}
    info = {"threshold": judges.threshold, "held_out": figures}
    write_judges(folder, {name: net.state_dict() for name, net in nets.items()}, info)

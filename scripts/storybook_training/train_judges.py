"""Train the judges on drawn scenes, measure them on held-out ones, and write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn

from customize.atomic import write_atomic
from customize.storybook.judges import HEADS, AttributeJudge, IdentityJudge, Judges
from customize.storybook.world import CLASSES, random_scene

from .judge_data import SEED, draw_pixels, identity_views, labels, roughen
from .measure_judges import draw_nearest, measure_judges
from .muon_adamw import MuonAdamW, trapezoid
from .training_files import log_row, save_tensors


def fit_judge(
    stage: str,
    folder: Path,
    model: nn.Module,
    loss_of: Callable[[torch.Generator], Tensor],
    steps: int,
    lr: float,
    every: int = 250,
) -> None:
    """Train a judge on `loss_of(generator)`, resuming from its checkpoint in the folder."""
    optimizer = MuonAdamW({"model": model}, lr, weight_decay=0.05)
    state, start = folder / f"{stage}-training.safetensors", 0
    if state.exists():
        tensors = load_file(state)
        start = int(tensors.pop("step"))
        model.load_state_dict({name: tensors.pop(f"model.{name}") for name in model.state_dict()})
        optimizer.load_state_tensors(tensors)
    model.train()
    total = torch.zeros(())
    for step in range(start, steps):
        loss = loss_of(torch.Generator().manual_seed(SEED + step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(trapezoid(step, steps, decay=0.5))
        total += loss.detach()
        if (step + 1) % 50 == 0:
            log_row(folder, stage=stage, step=step + 1, loss=total.item() / 50)
            total.zero_()
        if (step + 1) % every == 0 or step + 1 == steps:
            tensors = {"step": torch.tensor(step + 1)} | optimizer.state_tensors()
            save_tensors(state, tensors | {f"model.{k}": v for k, v in model.state_dict().items()})
    model.eval()


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

    fit_judge("attributes", folder, model, loss_of, steps, 2e-3)
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

    fit_judge("identity", folder, model, loss_of, steps, 2e-3)
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
    if (folder / "judges.json").exists():
        held_out: dict[str, float] = json.loads((folder / "judges.json").read_text())["held_out"]
        return held_out
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
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in (("attributes", judges.attributes), ("identity", judges.identity)):
        halves = {
            k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()
        }
        save_tensors(folder / f"{name}.safetensors", halves)
    info = {"threshold": judges.threshold, "held_out": figures}
    # Last, because its presence means that the files above are complete.
    write_atomic(folder / "judges.json", (json.dumps(info, indent=1) + "\n").encode())

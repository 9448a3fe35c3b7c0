"""What the trainings of all judges share: the loop, and the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from customize.atomic import write_atomic

from .muon_adamw import MuonAdamW, trapezoid
from .training_files import halved, log_row, save_tensors


def fit_judge(
    stage: str,
    folder: Path,
    model: nn.Module,
    loss_of: Callable[[torch.Generator], Tensor],
    steps: int,
    lr: float,
    seed: int,
    every: int = 250,
    bf16: bool = False,
) -> None:
    """Train a judge on `loss_of(generator)`, resuming from its checkpoint in the folder.

    Args:
        stage: Name in the log and of the checkpoint.
        folder: Of both.
        model: The net.
        loss_of: Returns the loss of a step.
        steps: Number of them.
        lr: Learning rate, as `MuonAdamW` takes it.
        seed: Of the first step; each has its own generator.
        every: Steps between checkpoints.
        bf16: Whether to compute the loss in bfloat16 where autocast does.
    """
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
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(torch.Generator().manual_seed(seed + step))
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


def write_judges(folder: Path, nets: dict[str, dict[str, Tensor]], content: dict[str, Any]) -> None:
    """Write the tensors of each net in float16, and judges.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in nets.items():
        save_tensors(folder / f"{name}.safetensors", halved(tensors))
    # Last, because its presence means that the files above are complete.
    write_atomic(folder / "judges.json", (json.dumps(content, indent=1) + "\n").encode())


def read_figures(folder: Path) -> dict[str, float] | None:
    """The held-out figures of finished judges; None if they are not finished."""
    path = folder / "judges.json"
    figures: dict[str, float] | None = None
    if path.exists():
        figures = json.loads(path.read_text())["held_out"]
    return figures

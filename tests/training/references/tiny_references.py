"""Small trainings of references: a tiny Stable Diffusion, a tiny Qwen2-VL, groups of ramps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from customize.references.model import ReferenceModel
from customize.training.references.config import ReferenceTrainConfig
from tests.references.tiny_mllm import tiny_mllm, tiny_processor
from tests.training.runs import picture

#: A run of 4 steps.
SMALL: dict[str, Any] = {
    "base": "tiny",
    "stage": "alignment",
    "resolution": 32,
    "num_tokens": 4,
    "lora_rank": 2,
    "reference_resolution": None,
    "steps": 4,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "checkpoint_every": 0,
    "validation_groups": 0,
    "log_every": 2,
}
ENCODER = ("num_tokens", "lora_rank", "reference_resolution")


def make_groups(folder: Path, sizes: tuple[int, ...] = (3, 2)) -> Path:
    """Write groups of these sizes, with captions."""
    for group, size in enumerate(sizes):
        (folder / f"g{group}").mkdir(parents=True)
        for number in range(size):
            picture(10 * group + number, 40).save(folder / f"g{group}" / f"{number}.png")
            (folder / f"g{group}" / f"{number}.txt").write_text(f"a photo of dog {number}")
    return folder


def make_metadata(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a metadata file, and the images that it names and that do not exist."""
    for number, row in enumerate(rows):
        path = folder / row["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            picture(number, 40).save(path)
    file = folder / "metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


def make_mllm(folder: Path) -> Path:
    """Write a random Qwen2-VL with its processor."""
    if not folder.exists():
        tiny_mllm().save_pretrained(folder)
        tiny_processor().save_pretrained(folder)
    return folder


def settings(folder: Path, output: str = "out", **changes: Any) -> ReferenceTrainConfig:
    """Return the configuration of a small run in a test's folder."""
    values = {**SMALL, "images": folder / "images", "output": folder / output, **changes}
    if not (folder / "images").exists():
        make_groups(folder / "images")
    if values.get("init") is None:
        values["mllm"] = make_mllm(folder / "mllm")
    else:
        values = {key: value for key, value in values.items() if key not in ENCODER}
    return ReferenceTrainConfig(**values)


def tensors(model: ReferenceModel) -> dict[str, Tensor]:
    """Return all weights of references by name."""
    named = {f"encoder.{key}": value for key, value in model.encoder.state_dict().items()}
    return named | {f"adapter.{key}": value for key, value in model.adapter.state_dict().items()}

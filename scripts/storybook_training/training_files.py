"""Files of the from-scratch trainings: tensors, written atomically, and a log of losses."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save

from customize.atomic import write_atomic


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors as safetensors, over an existing file."""
    # Not safetensors' save_file, which ignores the umask.
    write_atomic(path, save({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}))


def halved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Floating-point tensors in float16, others as they are."""
    return {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}


def log_row(folder: Path, **row: object) -> None:
    """Append a row to log.jsonl and print it."""
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(
        " ".join(f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()),
        flush=True,
    )

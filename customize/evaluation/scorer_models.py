"""Models for scoring, which the user names: loaded whole and in float32, read in batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from customize.errors import PipelineError
from customize.safe_read import check_regular_files

# Pictures or prompts a call.
BATCH = 32


def load_model(
    loader: Any,
    model: str | Path,
    kind: str,
    types: Sequence[str],
    unused: tuple[str, ...] = (),
) -> Any:
    """A model in evaluation mode and float32, refused where weights would be made up.

    transformers loads any folder as any class and fills what is missing at random, with a warning.

    Args:
        kind: what the model is called in errors.
        types: config.json's model_type of what may be given.
        unused: beginnings of the names of weights that may lack, as nothing here reads them.

    Raises:
        PipelineError: it is not there, of another type, or not whole.
    """
    from transformers import AutoConfig

    what = f"the {kind} model"
    found = load_pretrained(AutoConfig, model, what).model_type
    if found not in types:
        raise PipelineError(
            f"this is a model of type {found}, not a {kind} model",
            where=model,
            fix=f"give one of type {' or '.join(types)}",
        )
    loaded, notes = load_pretrained(
        loader, model, what, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(key for key in notes["missing_keys"] if not key.startswith(unused))
    if missing:
        raise PipelineError(
            f"{what} lacks {len(missing)} weights, such as {missing[0]}",
            where=model,
            fix=f"give the folder or hub id of a whole {kind} model",
        )
    return loaded.eval()


def load_pretrained(loader: Any, model: str | Path, what: str, **settings: Any) -> Any:
    """What a class of transformers reads from a folder or the hub.

    Raises:
        PipelineError: it cannot.
    """
    try:
        if os.path.isdir(model):
            check_regular_files(model)
        return loader.from_pretrained(model, **settings)
    except Exception as error:  # files missing, offline, gated, damaged: all the same here
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise PipelineError(
            f"{what} cannot be loaded: {reason}",
            where=model,
            fix="give the folder or hub id of a transformers model with safetensors weights",
        ) from error


def pixel_batches(
    processor: Any, pictures: Sequence[Image.Image], device: str | torch.device
) -> Iterator[Tensor]:
    """Pictures as a model takes them, a batch at a time."""
    for part in split_batches(pictures):
        yield processor(images=part, return_tensors="pt")["pixel_values"].to(device)


def split_batches(items: Sequence[Any]) -> list[list[Any]]:
    return [list(items[first : first + BATCH]) for first in range(0, len(items), BATCH)]


def unit_features(features: Any) -> Tensor:
    """Features (n, d) as unit vectors, float32, on the CPU; transformers 5 wraps CLIP's in an
    output object."""
    pooled: Tensor = getattr(features, "pooler_output", features)
    return F.normalize(pooled.float().cpu(), dim=-1)

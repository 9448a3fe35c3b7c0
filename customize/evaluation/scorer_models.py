"""Scoring models: loaded completely in float32, and applied in batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from customize.errors import PipelineError, first_line
from customize.safe_read import check_regular_files
from customize.text import plural

# Images or prompts per call.
BATCH_SIZE = 32


def load_model(
    loader: Any,
    model: str | Path,
    kind: str,
    types: Sequence[str],
    unused: tuple[str, ...] = (),
    dtype: torch.dtype | str = torch.float32,
) -> Any:
    """Load a model in evaluation mode, and refuse missing weights.

    transformers loads any folder as any class, and initialises missing weights at random with a
    warning.

    Args:
        loader: Class of transformers.
        model: Folder or hub id.
        kind: Name of the model in errors.
        types: Accepted values of model_type in config.json.
        unused: Prefixes of weights that may be missing, as the scorer does not use them.
        dtype: Dtype of the weights; "auto" for that of the file.

    Raises:
        PipelineError: The model cannot be loaded, has another type, or lacks weights.
    """
    from transformers import AutoConfig

    title = f"the {kind} model"
    model_type = load_pretrained(AutoConfig, model, title).model_type
    if model_type not in types:
        raise PipelineError(
            f"the model is of type {model_type}, not a {kind} model",
            where=model,
            fix=f"give one of type {' or '.join(types[:8])}",
        )
    loaded, notes = load_pretrained(
        loader, model, title, use_safetensors=True, dtype=dtype, output_loading_info=True
    )
    missing = sorted(key for key in notes["missing_keys"] if not key.startswith(unused))
    if missing:
        raise PipelineError(
            f"{title} lacks {plural(len(missing), 'weight')}, such as {missing[0]}",
            where=model,
            fix=f"give the folder or hub id of a complete {kind} model",
        )
    return loaded.eval()


def load_pretrained(loader: Any, model: str | Path, title: str, **settings: Any) -> Any:
    """Call `loader.from_pretrained`, for a class of transformers.

    Raises:
        PipelineError: The call fails; `title` names the object in the error.
    """
    try:
        if os.path.isdir(model):
            check_regular_files(model)
        return loader.from_pretrained(model, **settings)
    except Exception as error:  # missing or damaged files, offline, gated models
        reason = first_line(error)
        raise PipelineError(
            f"{title} cannot be loaded: {reason}",
            where=model,
            fix="give the folder or hub id of a transformers model with safetensors weights",
        ) from error


def pixel_batches(
    processor: Any, images: Sequence[Image.Image], device: str | torch.device
) -> Iterator[Tensor]:
    """Preprocess images in batches: yields (batch, 3, height, width) on the device."""
    for part in split_batches(images):
        yield processor(images=part, return_tensors="pt")["pixel_values"].to(device)


def split_batches(items: Sequence[Any]) -> list[list[Any]]:
    """Split a sequence into lists of :data:`BATCH_SIZE`."""
    return [list(items[first : first + BATCH_SIZE]) for first in range(0, len(items), BATCH_SIZE)]


def unit_features(features: Any) -> Tensor:
    """Normalise features (n, d) to unit vectors, float32, on the CPU.

    transformers 5 wraps CLIP's features in an output object.
    """
    pooled: Tensor = getattr(features, "pooler_output", features)
    return F.normalize(pooled.float().cpu(), dim=-1)

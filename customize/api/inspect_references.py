"""The contents of reference models and of encoded groups of reference images."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from customize.concepts.io.data_files import read_json_file
from customize.errors import ConceptError
from customize.references.group import ReferenceGroup
from customize.references.model import is_model_folder
from customize.references.model_files import (
    ADAPTER_FILE,
    ENCODER_CONFIG_FILE,
    ENCODER_FILE,
    read_config,
)
from customize.references.request import is_encoded
from customize.safe_read import read_safetensors_header


def is_references(source: Any) -> bool:
    """Whether a source is the folder of a reference model, or the file of an encoded group."""
    if not isinstance(source, str | os.PathLike):
        return False
    return is_encoded(source) or is_model_folder(Path(source))


def describe_references(source: str | Path) -> dict[str, str]:
    """Return the facts on a reference model or an encoded group: title -> text for a table.

    Args:
        source: Folder of a reference model, or ``.refs.safetensors`` file.

    Raises:
        CustomizeError: A file cannot be read, or is damaged.
    """
    if is_encoded(source):
        return _describe_group(ReferenceGroup.load(source))
    return _describe_model(Path(source))


def _describe_group(group: ReferenceGroup) -> dict[str, str]:
    rows = {
        "kind": "group of reference images",
        "tokens": " x ".join(map(str, group.tokens.shape)),
        "prompt": group.prompt or "none",
        "reference model": group.model or "unknown",
    }
    numbers = zip(group.names, group.digests, group.agreement, group.weights, strict=True)
    return rows | {
        f"image {index}": f"{name}: agreement {agreement:.2f}, weight {weight:.2f}, "
        f"sha256 {digest[:16]}"
        for index, (name, digest, agreement, weight) in enumerate(numbers, 1)
    }


def _describe_model(folder: Path) -> dict[str, str]:
    config = read_config(folder)
    mllm = read_json_file(folder / ENCODER_CONFIG_FILE)
    sizes = {name: _count_parameters(folder / name) for name in (ENCODER_FILE, ADAPTER_FILE)}
    return {
        "kind": "reference model",
        "family": config.family,
        "MLLM": str(mllm.get("model_type") if isinstance(mllm, dict) else None),
        "tokens": f"{config.num_tokens} x {config.width}",
        "images": f"1 to {config.max_references}",
        "attributes": "any word"
        if config.attributes is None
        else ", ".join(config.attributes) or "none",
        "reads the prompt": "yes" if config.includes_prompt else "no",
        "attention, positions": f"{config.attention}, {config.positions}",
        "LoRA rank, alpha": f"{config.lora_rank}, {config.lora_alpha:g}"
        if config.lora_rank
        else "none",
        "parameters": f"{sizes[ENCODER_FILE]:,} of the encoder, {sizes[ADAPTER_FILE]:,} of the "
        "adapter",
    }


def _count_parameters(path: Path) -> int:
    try:
        shapes, _ = read_safetensors_header(path)
    except (OSError, ValueError) as error:
        raise ConceptError(
            f"the file cannot be read: {error}", where=path, fix="get an unchanged copy"
        ) from error
    return sum(math.prod(shape) for shape in shapes.values())

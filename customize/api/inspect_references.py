"""The contents of reference models and of encoded groups of reference images."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from customize.concepts.io.data_files import read_json_file
from customize.errors import ConceptError
from customize.references.config import ReferencesConfig
from customize.references.easyref_file import is_easyref
from customize.references.easyref_layout import make_config, map_keys
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
    """Whether a source is a reference model, or the file of an encoded group."""
    if not isinstance(source, str | os.PathLike):
        return False
    return is_encoded(source) or is_model_folder(Path(source)) or _is_easyref(Path(source))


def describe_references(source: str | Path) -> dict[str, str]:
    """Return the facts on a reference model or an encoded group: title -> text for a table.

    Args:
        source: Folder of a reference model, EasyRef's file, or ``.refs.safetensors`` file.

    Raises:
        CustomizeError: A file cannot be read, or is damaged.
    """
    if is_encoded(source):
        return _describe_group(ReferenceGroup.load(source))
    path = Path(source)
    return _describe_folder(path) if os.path.isdir(path) else _describe_easyref(path)


def _is_easyref(path: Path) -> bool:
    try:
        return path.suffix == ".safetensors" and os.path.isfile(path) and is_easyref(path)
    except ConceptError:  # a damaged file of whatever kind
        return False


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


def _describe_folder(folder: Path) -> dict[str, str]:
    values = read_json_file(folder / ENCODER_CONFIG_FILE)
    mllm = values.get("model_type") if isinstance(values, dict) else None
    files = (folder / ENCODER_FILE, folder / ADAPTER_FILE)
    sizes = [sum(map(math.prod, _read_shapes(file).values())) for file in files]
    return _describe_model(read_config(folder), str(mllm or "unknown"), *sizes)


def _describe_easyref(path: Path) -> dict[str, str]:
    shapes = _read_shapes(path)
    keys = map_keys(shapes, path)
    sizes = [sum(math.prod(shapes[key]) for key in part) for part in (keys.encoder, keys.adapter)]
    mllm = "qwen2_vl, whose folder is needed (mllm=, --mllm)"
    if not keys.has_mllm:
        mllm += " and has its weights"
    return _describe_model(make_config(shapes, keys), mllm, *sizes) | {
        "kind": "reference model, EasyRef's file"
    }


def _describe_model(
    config: ReferencesConfig, mllm: str, encoder_size: int, adapter_size: int
) -> dict[str, str]:
    return {
        "kind": "reference model",
        "family": config.family,
        "MLLM": mllm,
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
        "parameters": f"{encoder_size:,} of the encoder, {adapter_size:,} of the adapter",
    }


def _read_shapes(path: Path) -> dict[str, list[int]]:
    try:
        return read_safetensors_header(path)[0]
    except (OSError, ValueError) as error:
        raise ConceptError(
            f"the file cannot be read: {error}", where=path, fix="get an unchanged copy"
        ) from error

"""The outline of a base: its models on the meta device, from configurations alone."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from customize.base.memory_plan import (
    MemoryPlan,
    choose_plan,
    measure_components,
    parse_memory_size,
)
from customize.base.quantization import nf4_config
from customize.errors import PipelineError
from customize.families import Family, family_of
from customize.near_names import suggest_paths
from customize.safe_read import MAX_TABLE_BYTES, check_regular_files, read_json

_LIBRARIES = ("diffusers", "transformers")


def load_on_meta_device(base: str | Path, dtype: torch.dtype) -> Family:
    """A base's models without weights, as they would be loaded in this dtype.

    Args:
        base: a folder as ``save_pretrained`` writes it, or a hub id, of which only the
            configurations are downloaded.

    Raises:
        PipelineError: it has no model_index.json, or its family is unknown.
    """
    folder = Path(base) if os.path.isdir(base) else _download(str(base))
    index = folder / "model_index.json"
    if not index.is_file():
        raise PipelineError(
            "there is no model_index.json",
            where=f"base: {base}",
            fix="name a folder or hub id of a diffusers pipeline",
        )
    components, config = {}, _config_of(index)
    for key, found in config.items():
        library, name = found if isinstance(found, list) and len(found) == 2 else ("", "")
        if library in _LIBRARIES and (folder / key / "config.json").is_file():
            # Below diffusers' own `to`, which warns of what matters to weights alone.
            components[key] = nn.Module.to(_model(library, name, folder / key), dtype)
        elif not key.startswith("_"):
            components[key] = None
    return family_of(components, config)


def _config_of(index: Path) -> Any:
    try:
        check_regular_files(index.parent)
        return read_json(index, MAX_TABLE_BYTES)
    except (OSError, ValueError) as error:
        raise PipelineError(
            f"the base cannot be read: {getattr(error, 'strerror', None) or error}",
            where=getattr(error, "filename", None) or index,
            fix="get an unchanged copy of the base",
        ) from error


def plan_base_memory(
    word: str,
    base: str | Path | Any,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> tuple[MemoryPlan, dict[str, Any]]:
    """What :func:`customize.memory_plan` does."""
    dtype = dtype or torch.bfloat16
    device = device or _accelerator()
    family = load_on_meta_device(base, dtype)
    quantizer = device == "cuda" and find_spec("bitsandbytes") is not None
    chosen = choose_plan(measure_components(family), parse_memory_size(word), device, quantizer)
    return chosen, {"dtype": dtype} | quantization_arguments(chosen, family, dtype)


def quantization_arguments(
    chosen: MemoryPlan, family: Family, dtype: torch.dtype
) -> dict[str, Any]:
    """What ``from_pretrained`` must be told of a plan that loads models in 4 bits."""
    if not chosen.quantized_components:
        return {}
    import diffusers
    import transformers

    def config(key: str) -> Any:
        # Each library has a class of its own for the same.
        return nf4_config(diffusers if key == family.denoiser_key else transformers, dtype)

    mapping = {key: config(key) for key in chosen.quantized_components}
    return {"quantization_config": diffusers.PipelineQuantizationConfig(quant_mapping=mapping)}


def _model(library: str, name: str, folder: Path) -> Any:
    cls = getattr(import_module(library), name)
    with torch.device("meta"):
        if library == "diffusers":
            return cls.from_config(cls.load_config(folder))
        return cls(cls.config_class.from_pretrained(folder))


def _download(base: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, allow_patterns=["model_index.json", "*/config.json"]))
    except Exception as error:  # files missing, offline, gated: all the same here
        raise PipelineError(
            f"the base's configurations cannot be read: there is no such folder, and the hub did "
            f"not give them: {str(error).strip().splitlines()[0]}",
            where=f"base: {base}",
            fix=suggest_paths(base, "name a folder or hub id of a diffusers pipeline"),
        ) from error


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type

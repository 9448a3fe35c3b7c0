"""Loading of a base's models on the meta device, without weights, and memory plans for a base."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from customize.base.device import current_accelerator
from customize.base.memory_plan import (
    MemoryPlan,
    choose_plan,
    measure_components,
    parse_memory_size,
)
from customize.base.quantization import nf4_config
from customize.errors import PipelineError
from customize.families import Family, family_of
from customize.families.meta_models import on_meta_device
from customize.near_names import suggest_paths
from customize.safe_read import MAX_TABLE_BYTES, check_regular_files, read_json

_LIBRARIES = ("diffusers", "transformers")


def load_on_meta_device(base: str | Path, dtype: torch.dtype) -> Family:
    """Load a base's models on the meta device, without weights.

    Args:
        base: A folder written by ``save_pretrained``, or a hub id, of which only the
            configurations are downloaded.
        dtype: The dtype of the weights.

    Raises:
        PipelineError: The base has no model_index.json, or its family is unknown.
    """
    folder = Path(base) if os.path.isdir(base) else _download(str(base))
    index = folder / "model_index.json"
    if not index.is_file():
        raise PipelineError(
            "the base has no model_index.json",
            where=f"base: {base}",
            fix="name a folder or hub id of a diffusers pipeline",
        )
    components, config = {}, _read_index(index)
    for key, entry in config.items():
        library, name = entry if isinstance(entry, list) and len(entry) == 2 else ("", "")
        if library in _LIBRARIES and (folder / key / "config.json").is_file():
            # Not diffusers' own `to`, which has warnings that concern real weights only.
            components[key] = nn.Module.to(_load_model(library, name, folder / key), dtype)
        elif not key.startswith("_"):
            components[key] = None
    return family_of(components, config)


def _read_index(index: Path) -> Any:
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
    memory: str,
    base: str | Path | Any,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> tuple[MemoryPlan, dict[str, Any]]:
    """Implement :func:`customize.memory_plan`; see there."""
    dtype = dtype or torch.bfloat16
    if device is None:
        accelerator = current_accelerator()
        device = "cpu" if accelerator is None else accelerator.type
    family = load_on_meta_device(base, dtype)
    quantizer = device == "cuda" and find_spec("bitsandbytes") is not None
    plan = choose_plan(measure_components(family), parse_memory_size(memory), device, quantizer)
    return plan, {"dtype": dtype} | quantization_arguments(plan, family, dtype)


def quantization_arguments(plan: MemoryPlan, family: Family, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` for the components that a plan quantizes.

    Args:
        plan: The memory plan.
        family: The base's family.
        dtype: The dtype of the arithmetic.
    """
    if not plan.quantized_components:
        return {}
    import diffusers
    import transformers

    mapping = {
        # diffusers and transformers have configuration classes of their own.
        key: nf4_config(diffusers if key == family.denoiser_key else transformers, dtype)
        for key in plan.quantized_components
    }
    return {"quantization_config": diffusers.PipelineQuantizationConfig(quant_mapping=mapping)}


def _load_model(library: str, name: str, folder: Path) -> Any:
    cls = getattr(import_module(library), name)
    with on_meta_device():
        if library == "diffusers":
            return cls.from_config(cls.load_config(folder))
        return cls(cls.config_class.from_pretrained(folder))


def _download(base: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, allow_patterns=["model_index.json", "*/config.json"]))
    except Exception as error:  # missing files, no network, gated repository
        raise PipelineError(
            f"the base's configurations cannot be read: there is no such folder, and the download "
            f"failed: {str(error).strip().splitlines()[0]}",
            where=f"base: {base}",
            fix=suggest_paths(base, "name a folder or hub id of a diffusers pipeline"),
        ) from error

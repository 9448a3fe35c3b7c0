"""Loading of a base from a checkpoint in one .safetensors file, by diffusers' ``from_single_file``.

The file has weights only. The configuration is that of a named folder or hub id, or the one that
diffusers detects from the file's keys and downloads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from customize.errors import ConfigError, PipelineError, first_line
from customize.safe_read import check_regular_files, read_safetensors_header

if TYPE_CHECKING:
    import torch


def load_single_file(
    base: str, dtype: torch.dtype | Mapping[str, torch.dtype], config: str | None
) -> Any:
    """Load the pipeline of a checkpoint on the CPU.

    Components that the file lacks, such as FLUX's text encoders, are loaded from ``config`` if it
    has their weights.

    Args:
        base: Path of the file.
        dtype: As for :func:`customize.base.load_pipeline.load_pipeline`.
        config: A folder written by ``save_pretrained``, with or without weights, or a hub id; None:
            the configuration that diffusers detects.

    Raises:
        ConfigError: The file does not exist.
        PipelineError: The configuration is not available, or the weights do not match it.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    where = f"base: {base}"
    if not os.path.isfile(base):
        raise ConfigError("there is no such file", where=where, fix="name an existing file")
    read_safetensors_header(base)  # checks that the file is regular and complete
    if config is not None and os.path.isdir(config):
        check_regular_files(config)
    dtypes = dtype if isinstance(dtype, Mapping) else {"default": dtype}
    main = dtypes["default"]
    vae = dtypes.get("vae", main)
    repository = config or _detect_configuration(base)
    try:
        index = diffusers.DiffusionPipeline.load_config(repository)
        kind: Any = getattr(diffusers, str(index["_class_name"]))
    except Exception as error:
        raise PipelineError(
            f"the configuration of the single file's pipeline, {repository}, cannot be read: "
            f"{first_line(error.__cause__ or error)}",
            where=where,
            fix="set base_config (--base-config FOLDER) to a folder with model_index.json and the "
            "components' configurations and tokenizers",
        ) from error
    if not hasattr(kind, "from_single_file"):
        raise PipelineError(
            f"diffusers does not support single files of {kind.__name__}",
            where=where,
            fix="name a folder or hub id of the pipeline",
        )
    options: dict[str, Any] = {"config": repository, "torch_dtype": main}
    try:
        pipe = kind.from_single_file(base, **options)
    except SingleFileComponentError as error:
        components = _load_components(repository, index, main)
        if not components:
            raise PipelineError(
                "the file lacks a component of the pipeline: "
                + first_line(error.__cause__ or error),
                where=where,
                fix="set base_config (--base-config FOLDER) to a pipeline's folder with the "
                "weights of the missing components",
            ) from error
        pipe = kind.from_single_file(base, **options, **components)
    if vae != main and pipe.components.get("vae") is not None:
        pipe.register_modules(vae=_load_vae(base, repository, pipe.vae, vae))
    return pipe


def _load_vae(base: str, repository: str, loaded: Any, dtype: Any) -> Any:
    """Load the autoencoder again in its own dtype, because a cast does not undo rounding."""
    kind = type(loaded)
    try:
        return kind.from_single_file(base, config=repository, subfolder="vae", torch_dtype=dtype)
    except Exception:  # the file has no autoencoder, so the configuration had its weights
        return kind.from_pretrained(
            repository, subfolder="vae", torch_dtype=dtype, use_safetensors=True
        )


def _load_components(repository: str, index: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Load the text encoders and the autoencoder for which a pipeline has weights."""
    components = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or not (name == "vae" or name.startswith("text_encoder")):
            continue
        library, class_name = entry
        if library not in ("diffusers", "transformers"):
            continue
        kind = getattr(import_module(library), class_name)
        try:
            components[name] = kind.from_pretrained(
                repository, subfolder=name, torch_dtype=dtype, use_safetensors=True
            )
        except OSError:  # no weights
            continue
    return components


def _detect_configuration(base: str) -> str:
    """Return the hub id of the configuration that diffusers detects from the file's keys."""
    from diffusers.loaders.single_file_utils import (
        fetch_diffusers_config,
        load_single_file_checkpoint,
    )

    try:
        checkpoint = load_single_file_checkpoint(base)
        return str(fetch_diffusers_config(checkpoint)["pretrained_model_name_or_path"])
    except Exception as error:
        raise PipelineError(
            f"the file cannot be read as a checkpoint: {first_line(error.__cause__ or error)}",
            where=f"base: {base}",
            fix="get an unchanged copy, or name a folder or hub id of a pipeline",
        ) from error

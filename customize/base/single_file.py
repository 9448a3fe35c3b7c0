"""A base that is one .safetensors file, as other programs keep checkpoints, by diffusers' reader.

The file has weights alone. What the models look like is in a pipeline's configuration: that of a
folder or hub id that is named, or the one that diffusers knows for the file's keys and downloads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from customize.errors import ConfigError, PipelineError
from customize.safe_read import check_regular_files, read_safetensors_header

if TYPE_CHECKING:
    import torch


def load_single_file(
    base: str, dtype: torch.dtype | Mapping[str, torch.dtype], config: str | None
) -> Any:
    """The pipeline of a checkpoint's weights, on the CPU.

    Components that the file lacks, such as FLUX's text encoders, are taken from ``config`` where it
    has their weights.

    Args:
        base: path of the file.
        dtype: as for :func:`customize.base.load_pipeline.load_pipeline`.
        config: a folder as ``save_pretrained`` writes it, also without weights, or a hub id; None:
            what diffusers knows for the file's keys.

    Raises:
        ConfigError: there is no such file.
        PipelineError: no configuration is at hand, or the weights do not fit it.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    where = f"base: {base}"
    if not os.path.isfile(base):
        raise ConfigError("there is no such file", where=where, fix="name one that is there")
    read_safetensors_header(base)  # it is regular and whole
    if config is not None and os.path.isdir(config):
        check_regular_files(config)
    dtypes = dtype if isinstance(dtype, Mapping) else {"default": dtype}
    main = dtypes["default"]
    vae = dtypes.get("vae", main)
    repository = config or _known_configuration(base)
    try:
        index = diffusers.DiffusionPipeline.load_config(repository)
        kind: Any = getattr(diffusers, str(index["_class_name"]))
    except Exception as error:
        raise PipelineError(
            f"the configuration of the single file's pipeline, {repository}, cannot be read: "
            f"{_first_line(error)}",
            where=where,
            fix="name a folder that has it, with model_index.json and the components' "
            "configurations and tokenizers: base_config (--base-config FOLDER)",
        ) from error
    if not hasattr(kind, "from_single_file"):
        raise PipelineError(
            f"diffusers reads no single file as {kind.__name__}",
            where=where,
            fix="name a folder or hub id of the pipeline",
        )
    given: dict[str, Any] = {"config": repository, "torch_dtype": main}
    try:
        pipe = kind.from_single_file(base, **given)
    except SingleFileComponentError as error:
        parts = _components_of(repository, index, main)
        if not parts:
            raise PipelineError(
                f"the file lacks a component of the pipeline: {_first_line(error)}",
                where=where,
                fix="name a pipeline's folder with the weights of what is lacking: base_config "
                "(--base-config FOLDER)",
            ) from error
        pipe = kind.from_single_file(base, **given, **parts)
    if vae != main and pipe.components.get("vae") is not None:
        pipe.register_modules(vae=_vae(base, repository, pipe.vae, vae))
    return pipe


def _vae(base: str, repository: str, loaded: Any, dtype: Any) -> Any:
    """The autoencoder once more, in a precision of its own; rounding is not undone by a cast."""
    kind = type(loaded)
    try:
        return kind.from_single_file(base, config=repository, subfolder="vae", torch_dtype=dtype)
    except Exception:  # it was the configuration's
        return kind.from_pretrained(
            repository, subfolder="vae", torch_dtype=dtype, use_safetensors=True
        )


def _components_of(repository: str, index: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """The text encoders and the autoencoder of a pipeline that has their weights."""
    found = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or not (name == "vae" or name.startswith("text_encoder")):
            continue
        library, class_name = entry
        if library not in ("diffusers", "transformers"):
            continue
        kind = getattr(import_module(library), class_name)
        try:
            found[name] = kind.from_pretrained(
                repository, subfolder=name, torch_dtype=dtype, use_safetensors=True
            )
        except OSError:  # no weights there
            continue
    return found


def _known_configuration(base: str) -> str:
    """The hub id whose configuration diffusers takes for such a file's keys."""
    from diffusers.loaders.single_file_utils import (
        fetch_diffusers_config,
        load_single_file_checkpoint,
    )

    try:
        checkpoint = load_single_file_checkpoint(base)
        return str(fetch_diffusers_config(checkpoint)["pretrained_model_name_or_path"])
    except Exception as error:
        raise PipelineError(
            f"the file cannot be read as a checkpoint: {_first_line(error)}",
            where=f"base: {base}",
            fix="get it again, or name a folder or hub id of a pipeline",
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error.__cause__ or error).strip().splitlines()), type(error).__name__)

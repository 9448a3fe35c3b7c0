"""Loading of a base pipeline from safetensors weights, with one error message for all causes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from customize.base.config_values import check_config_values
from customize.base.single_file import load_single_file
from customize.base.weight_files import local_folder, select_variants
from customize.errors import ConfigError, CustomizeError, PipelineError, first_line
from customize.families import COMPONENTS
from customize.near_names import suggest_paths
from customize.safe_read import MAX_TABLE_BYTES, PICKLE_SUFFIXES, check_regular_files, read_json

if TYPE_CHECKING:
    import torch

_INDEX, _MODULAR_INDEX = "model_index.json", "modular_model_index.json"
_FIX = "name a folder or hub id of a diffusers pipeline with safetensors weights"


def load_pipeline(
    base: str,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    *,
    variant: str | None = None,
    config: str | None = None,
) -> Any:
    """Load a pipeline on the CPU, or a modular pipeline if diffusers has no standard one.

    Of a modular pipeline only the components that families use are loaded, and steps that use none
    of them, such as prompt rewriting, are removed.

    Args:
        base: A folder written by ``save_pretrained``, a hub id, or a checkpoint in one
            .safetensors file.
        dtype: The dtype of the weights, as for ``DiffusionPipeline.from_pretrained``.
        variant: Variant of the weight files, such as "fp16", for the components that have it. None:
            the files without a variant, or a component's only variant.
        config: Configuration of a single file; see
            :func:`customize.base.single_file.load_single_file`.

    Raises:
        ConfigError: The base is a single file of another format, or does not take ``config``.
        PipelineError: The base is missing, not a diffusers pipeline, lacks weights, or has invalid
            values in its configuration.
    """
    where = f"base: {base}"
    if base.lower().endswith(PICKLE_SUFFIXES):
        raise ConfigError(
            "pickle files can run code when they are loaded, so they are refused",
            where=where,
            fix=_FIX,
        )
    single = base.lower().endswith(".safetensors")
    if base.lower().endswith(".gguf") or (os.path.isfile(base) and not single):
        raise ConfigError(
            "the single file is not a pipeline in .safetensors format",
            where=where,
            fix="name a .safetensors checkpoint, or a folder or hub id of a diffusers pipeline",
        )
    if single and variant is not None:
        raise ConfigError(
            "a single file has no variants", where=f"variant: {variant}", fix="leave it out"
        )
    if config is not None and not single:
        raise ConfigError(
            "only a single file needs a separate configuration",
            where=f"base_config: {config}",
            fix="leave it out",
        )
    try:
        if os.path.isdir(base):
            check_regular_files(base)
        with _silence_loggers():
            if single:
                pipe = load_single_file(base, dtype, config)
            elif _is_modular(base):
                pipe = _load_modular(base, dtype, variant)
            else:
                pipe = _load_standard(base, dtype, variant)
    except CustomizeError:
        raise
    except Exception as error:  # missing files, no network, gated repository, unknown classes
        if os.path.isdir(base) or single:
            raise PipelineError(
                f"the base cannot be loaded: {first_line(error)}", where=where, fix=_FIX
            ) from error
        reason = first_line(error.__cause__ or error)  # diffusers chains the download's error
        raise PipelineError(
            f"the base cannot be loaded: there is no such folder, and the download failed: "
            f"{reason}",
            where=where,
            fix=suggest_paths(base, _FIX),
        ) from error
    missing = [
        f"{key}.{name}"
        for key, model in pipe.components.items()
        if isinstance(model, nn.Module)
        for name, parameter in model.named_parameters()
        if parameter.is_meta
    ]
    if missing:
        more = "" if len(missing) == 1 else f" and {len(missing) - 1} more"
        raise PipelineError(
            f"the base's files lack the weight {missing[0]}{more}",
            where=where,
            fix="get an unchanged copy of the base",
        )
    check_config_values(pipe, where)
    return pipe


def _load_standard(
    base: str, dtype: torch.dtype | Mapping[str, torch.dtype], variant: str | None
) -> Any:
    from diffusers import DiffusionPipeline

    dtypes: Any = dict(dtype) if isinstance(dtype, Mapping) else dtype
    if not os.path.isdir(base):
        try:
            # Downloads the variant, and weights without a variant for components that lack it.
            return DiffusionPipeline.from_pretrained(
                base, dtype=dtypes, use_safetensors=True, variant=variant
            )
        except Exception:
            folder = local_folder(base)
            if folder is None or variant is not None or not any(select_variants(folder).values()):
                raise
            base = str(folder)  # the cache has only a variant
    components = {
        name: _load_component(base, name, variant, dtype)
        for name, variant in select_variants(Path(base), variant).items()
        if variant
    }
    components = {name: model for name, model in components.items() if model is not None}
    return DiffusionPipeline.from_pretrained(base, dtype=dtypes, use_safetensors=True, **components)


def _load_component(
    base: str, name: str, variant: str, dtype: torch.dtype | Mapping[str, torch.dtype]
) -> Any:
    """Load a component from the files of a variant; None if the pipeline does not have it."""
    index = read_json(Path(base) / _INDEX, MAX_TABLE_BYTES)
    library, class_name = (index.get(name) or [None, None])[:2]
    if library is None or class_name is None:
        return None
    module = (
        library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
    )
    kind: Any = getattr(import_module(module), class_name)
    return kind.from_pretrained(
        base,
        subfolder=name,
        variant=variant,
        dtype=_dtype_of(name, dtype),
        use_safetensors=True,
    )


def _load_modular(
    base: str, dtype: torch.dtype | Mapping[str, torch.dtype], variant: str | None
) -> Any:
    from diffusers import ModularPipeline

    pipe: Any = ModularPipeline.from_pretrained(base)
    blocks = pipe.blocks
    for name, block in list(blocks.sub_blocks.items()):
        pretrained = {
            spec.name
            for spec in block.expected_components
            if spec.default_creation_method == "from_pretrained"
        }
        if pretrained and not pretrained & COMPONENTS:
            del blocks.sub_blocks[name]
    pipe = type(pipe)(blocks=blocks, pretrained_model_name_or_path=base)
    folder = local_folder(base)
    variants = {} if folder is None else select_variants(folder, variant)
    components = {}
    for name in pipe.pretrained_component_names:
        spec = pipe.get_component_spec(name)
        if name not in COMPONENTS or not spec.pretrained_model_name_or_path:
            continue
        kind = spec.type_hint
        is_model = not isinstance(kind, type) or issubclass(kind, nn.Module)
        if is_model and (variants.get(name) or variant):
            spec.variant = variants.get(name) or variant
        # Not load_components, which ignores components that fail to load.
        options = {"dtype": _dtype_of(name, dtype), "use_safetensors": True} if is_model else {}
        components[name] = spec.load(**options)
    pipe.update_components(**components)
    return pipe


def _is_modular(base: str) -> bool:
    """Whether the base is a modular pipeline only."""
    if os.path.isdir(base):
        names = os.listdir(base)
        return _MODULAR_INDEX in names and _INDEX not in names
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        hf_hub_download(base, _INDEX)
    except EntryNotFoundError:
        try:
            hf_hub_download(base, _MODULAR_INDEX)
        except Exception:  # loading it as a standard pipeline reports the cause
            return False
        return True
    except Exception:
        return False
    return False


def _dtype_of(name: str, dtype: torch.dtype | Mapping[str, torch.dtype]) -> torch.dtype:
    return dtype.get(name, dtype["default"]) if isinstance(dtype, Mapping) else dtype


@contextmanager
def _silence_loggers() -> Iterator[None]:
    """Silence the libraries' loggers; the error has the relevant message."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    before = [library.get_verbosity() for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity(library.CRITICAL)
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)

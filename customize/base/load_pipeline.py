"""Opening a base: a diffusers pipeline from safetensors, whole, or one clear error."""

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
from customize.errors import ConfigError, CustomizeError, PipelineError
from customize.families import COMPONENTS
from customize.near_names import suggest_paths
from customize.safe_read import MAX_TABLE_BYTES, PICKLE_SUFFIXES, check_regular_files, read_json

if TYPE_CHECKING:
    import torch

_INDEX, _MODULAR_INDEX = "model_index.json", "modular_model_index.json"
_FOLDER = "name a folder or hub id of a diffusers pipeline with safetensors weights"


def load_pipeline(
    base: str,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    *,
    variant: str | None = None,
    config: str | None = None,
) -> Any:
    """A pipeline on the CPU; a modular one where diffusers has the model as that only.

    Of a modular one only what families work with is loaded, and steps that work with nothing of
    that, as those that rewrite prompts, are left out.

    Args:
        base: a folder as ``save_pretrained`` writes it, a hub id, or a checkpoint in one
            .safetensors file.
        dtype: of its weights, as ``DiffusionPipeline.from_pretrained`` takes it.
        variant: of the weight files, such as "fp16", where components have it. None: the plain
            ones, or the only one that a component has.
        config: of a single file, as :func:`customize.base.single_file.load_single_file` takes it.

    Raises:
        ConfigError: the base is a single file of another kind, or has no use for ``config``.
        PipelineError: it is not there, not as diffusers keeps pipelines, lacks weights, or has
            values in its configuration that make no sense.
    """
    where = f"base: {base}"
    if base.lower().endswith(PICKLE_SUFFIXES):
        raise ConfigError(
            "files of this kind can run code when they are opened, so they are not read",
            where=where,
            fix=_FOLDER,
        )
    single = base.lower().endswith(".safetensors")
    if base.lower().endswith(".gguf") or (os.path.isfile(base) and not single):
        raise ConfigError(
            "a single file of this kind is not a whole pipeline",
            where=where,
            fix="name a .safetensors checkpoint, or a folder or hub id of a diffusers pipeline",
        )
    if single and variant is not None:
        raise ConfigError(
            "a single file has no variants", where=f"variant: {variant}", fix="leave it out"
        )
    if config is not None and not single:
        raise ConfigError(
            "only a single file needs a configuration from elsewhere",
            where=f"base_config: {config}",
            fix="leave it out",
        )
    try:
        if os.path.isdir(base):
            check_regular_files(base)
        with _one_message():
            if single:
                pipe = load_single_file(base, dtype, config)
            elif _is_modular(base):
                pipe = _open_modular(base, dtype, variant)
            else:
                pipe = _open_standard(base, dtype, variant)
    except CustomizeError:
        raise
    except Exception as error:  # files missing, offline, gated, unknown classes: all the same here
        if os.path.isdir(base) or single:
            raise PipelineError(
                f"the base cannot be loaded: {_reason(error)}", where=where, fix=_FOLDER
            ) from error
        # Of a failed download diffusers tells the cause in the cause.
        reason = _reason(error.__cause__ or error)
        raise PipelineError(
            f"the base cannot be loaded: there is no such folder, and the hub did not give it: "
            f"{reason}",
            where=where,
            fix=suggest_paths(base, _FOLDER),
        ) from error
    missing = [
        f"{key}.{name}"
        for key, part in pipe.components.items()
        if isinstance(part, nn.Module)
        for name, parameter in part.named_parameters()
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


def _open_standard(
    base: str, dtype: torch.dtype | Mapping[str, torch.dtype], variant: str | None
) -> Any:
    from diffusers import DiffusionPipeline

    given: Any = dict(dtype) if isinstance(dtype, Mapping) else dtype
    if not os.path.isdir(base):
        try:
            # With nothing in the cache this downloads the variant, and plain weights where a
            # component has none.
            return DiffusionPipeline.from_pretrained(
                base, dtype=given, use_safetensors=True, variant=variant
            )
        except Exception:
            folder = local_folder(base)
            if folder is None or variant is not None or not any(select_variants(folder).values()):
                raise
            base = str(folder)  # of which the cache has a variant alone
    parts = {
        name: _component(base, name, variant, dtype)
        for name, variant in select_variants(Path(base), variant).items()
        if variant
    }
    return DiffusionPipeline.from_pretrained(
        base, dtype=given, use_safetensors=True, **{k: v for k, v in parts.items() if v is not None}
    )


def _component(
    base: str, name: str, variant: str, dtype: torch.dtype | Mapping[str, torch.dtype]
) -> Any:
    """One model of a folder from the files of a variant; None where the pipeline has none."""
    index = read_json(Path(base) / _INDEX, MAX_TABLE_BYTES)
    library, class_name = (index.get(name) or [None, None])[:2]
    if library is None or class_name is None:
        return None
    module = (
        library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
    )
    kind: Any = getattr(import_module(module), class_name)
    given = dtype.get(name, dtype["default"]) if isinstance(dtype, Mapping) else dtype
    return kind.from_pretrained(
        base, subfolder=name, variant=variant, dtype=given, use_safetensors=True
    )


def _open_modular(
    base: str, dtype: torch.dtype | Mapping[str, torch.dtype], variant: str | None
) -> Any:
    from diffusers import ModularPipeline

    pipe: Any = ModularPipeline.from_pretrained(base)
    blocks = pipe.blocks
    for name, block in list(blocks.sub_blocks.items()):
        loaded = {
            spec.name
            for spec in block.expected_components
            if spec.default_creation_method == "from_pretrained"
        }
        if loaded and not loaded & COMPONENTS:
            del blocks.sub_blocks[name]
    pipe = type(pipe)(blocks=blocks, pretrained_model_name_or_path=base)
    folder = local_folder(base)
    variants = {} if folder is None else select_variants(folder, variant)
    parts = {}
    for name in pipe.pretrained_component_names:
        spec = pipe.get_component_spec(name)
        if name not in COMPONENTS or not spec.pretrained_model_name_or_path:
            continue
        kind = spec.type_hint
        models = not isinstance(kind, type) or issubclass(kind, nn.Module)
        given = dtype.get(name, dtype["default"]) if isinstance(dtype, Mapping) else dtype
        if models and (variants.get(name) or variant):
            spec.variant = variants.get(name) or variant
        # Not by load_components, which goes on where one cannot be loaded.
        parts[name] = spec.load(**({"dtype": given, "use_safetensors": True} if models else {}))
    pipe.update_components(**parts)
    return pipe


def _is_modular(base: str) -> bool:
    """Whether the base is kept as a modular pipeline and not as a standard one too."""
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
        except Exception:  # opening it as the standard pipeline that it may be will tell
            return False
        return True
    except Exception:  # the same
        return False
    return False


def _reason(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _one_message() -> Iterator[None]:
    """Silence what the libraries say on the way; what matters of it is in the error."""
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

"""Opening a base: a diffusers pipeline from safetensors, whole, or one clear error."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from customize.errors import ConfigError, PipelineError
from customize.families import COMPONENTS
from customize.near_names import check_path
from customize.safe_read import check_regular

if TYPE_CHECKING:
    import torch

_INDEX, _MODULAR_INDEX = "model_index.json", "modular_model_index.json"
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
_FOLDER = "name a folder or hub id of a diffusers pipeline with safetensors weights"


def open_base(base: str, dtype: torch.dtype | Mapping[str, torch.dtype]) -> Any:
    """A pipeline on the CPU; a modular one where diffusers has the model as that only.

    Of a modular one only what families work with is loaded, and steps that work with nothing of
    that, as those that rewrite prompts, are left out.

    Args:
        base: a folder as ``save_pretrained`` writes it, or a hub id.
        dtype: of its weights, as ``DiffusionPipeline.from_pretrained`` takes it.

    Raises:
        ConfigError: the base is a single file.
        PipelineError: it is not there, not as diffusers keeps pipelines, or lacks weights.
    """
    where = f"base: {base}"
    if base.lower().endswith(_PICKLES):
        raise ConfigError(
            "files of this kind can run code when they are opened, so they are not read",
            where=where,
            fix=_FOLDER,
        )
    if base.lower().endswith((".safetensors", ".gguf")) or os.path.isfile(base):
        raise ConfigError(
            "a single file is not a whole pipeline",
            where=where,
            fix="load it with the from_single_file of its pipeline class, save_pretrained it to a "
            "folder, and name that",
        )
    try:
        if os.path.isdir(base):
            check_regular(base)
        with _one_message():
            pipe = _open_modular(base, dtype) if _is_modular(base) else _open_standard(base, dtype)
    except Exception as error:  # files missing, offline, gated, unknown classes: all the same here
        if os.path.isdir(base):
            raise PipelineError(
                f"the base cannot be loaded: {_reason(error)}", where=where, fix=_FOLDER
            ) from error
        # Of a failed download diffusers tells the cause in the cause.
        reason = _reason(error.__cause__ or error)
        raise PipelineError(
            f"the base cannot be loaded: there is no such folder, and the hub did not give it: "
            f"{reason}",
            where=where,
            fix=check_path(base, _FOLDER),
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
    return pipe


def _open_standard(base: str, dtype: torch.dtype | Mapping[str, torch.dtype]) -> Any:
    from diffusers import DiffusionPipeline

    given: Any = dict(dtype) if isinstance(dtype, Mapping) else dtype
    return DiffusionPipeline.from_pretrained(base, dtype=given, use_safetensors=True)


def _open_modular(base: str, dtype: torch.dtype | Mapping[str, torch.dtype]) -> Any:
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
    parts = {}
    for name in pipe.pretrained_component_names:
        spec = pipe.get_component_spec(name)
        if name not in COMPONENTS or not spec.pretrained_model_name_or_path:
            continue
        kind = spec.type_hint
        models = not isinstance(kind, type) or issubclass(kind, nn.Module)
        given = dtype.get(name, dtype["default"]) if isinstance(dtype, Mapping) else dtype
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

"""Selection of the weight files of a base's folder, with or without a variant.

``save_pretrained(variant="fp16")`` writes ``model.fp16.safetensors`` instead of
``model.safetensors``, and a download with ``variant="fp16"`` has no other weights. Components
without the variant have files without one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from customize.errors import PipelineError
from customize.near_names import suggest_names

#: File stems of diffusers' and transformers' weights.
_STEMS = ("diffusion_pytorch_model", "model")
_WEIGHTS = re.compile(
    rf"(?:{'|'.join(_STEMS)})"
    r"(?:\.(?P<one>[\w-]+?))?(?:-\d+-of-\d+)?(?:\.(?P<old>[\w-]+))?\.safetensors"
)


def list_variants(folder: Path) -> set[str]:
    """List the variants of a component's safetensors weights; "" means without a variant.

    Args:
        folder: Folder of the component; without weights, the result is empty.
    """
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    matches = [match for match in map(_WEIGHTS.fullmatch, names) if match]
    return {match["one"] or match["old"] or "" for match in matches}


def select_variants(folder: Path, variant: str | None = None) -> dict[str, str]:
    """Select the variant to load of each component with weights; "" means without a variant.

    It is the requested variant if the component has it, otherwise the files without a variant,
    otherwise the component's only variant.

    Args:
        folder: Folder of a pipeline, with a folder for each component.
        variant: The requested variant, or None.

    Returns:
        Component -> variant.

    Raises:
        PipelineError: No component has the requested variant; or a component has several variants
            and no files without one, and no variant is requested.
    """
    known = {path.name: list_variants(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    known = {component: variants for component, variants in known.items() if variants}
    all_variants = sorted(set().union(*known.values()) - {""})
    if variant is not None and known and variant not in all_variants:
        raise PipelineError(
            f"no component of the base has the variant {variant}",
            where=f"variant: {variant}",
            fix=suggest_names(variant, all_variants, "leave the variant out"),
        )
    selected = {}
    for component, variants in known.items():
        if variant is not None and variant in variants:
            selected[component] = variant
        elif "" in variants:
            selected[component] = ""
        elif len(variants) == 1:
            (selected[component],) = variants
        else:
            raise PipelineError(
                f"the base's {component} has no weights without a variant, but the variants "
                + " and ".join(sorted(variants)),
                where=folder / component,
                fix=f"set variant to one of them (--variant {min(variants)})",
            )
    return selected


def list_weight_files(folder: Path, variant: str) -> list[Path]:
    """List the safetensors files of a component's variant; "" means without a variant.

    Raises:
        FileNotFoundError: There are none.
    """
    files = []
    for entry in sorted(folder.iterdir()):
        match = _WEIGHTS.fullmatch(entry.name)
        if match and (match["one"] or match["old"] or "") == variant:
            files.append(entry)
    for stem in _STEMS:  # a complete file takes precedence over shards
        name = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
        if folder / name in files:
            return [folder / name]
    if not files:
        raise FileNotFoundError(f"no safetensors in {folder}")
    return files


def local_folder(base: str) -> Path | None:
    """Return the local folder of a base, or None if a hub id is not in the cache."""
    if os.path.isdir(base):  # unlike Path.is_dir, also of names that are too long
        return Path(base)
    from huggingface_hub import try_to_load_from_cache

    for name in ("model_index.json", "modular_model_index.json"):
        try:
            index = try_to_load_from_cache(base, name)
        except Exception:  # not a hub id
            return None
        if isinstance(index, str):
            return Path(index).parent
    return None

"""Which weight files of a base's folder are read: the plain ones, or those of a variant.

``save_pretrained(variant="fp16")`` writes ``model.fp16.safetensors`` in the place of
``model.safetensors``, and a download with ``variant="fp16"`` brings nothing else. Folders may also
be mixed, as some components have no such variant.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from customize.errors import PipelineError
from customize.near_names import suggest_names

#: Of diffusers' weight files and transformers'.
_STEMS = ("diffusion_pytorch_model", "model")
_WEIGHTS = re.compile(
    rf"(?:{'|'.join(_STEMS)})"
    r"(?:\.(?P<one>[\w-]+?))?(?:-\d+-of-\d+)?(?:\.(?P<old>[\w-]+))?\.safetensors"
)


def list_variants(folder: Path) -> set[str]:
    """The variants of a component's weights in safetensors; "" stands for plain ones.

    Args:
        folder: of the component. Empty where it has no such weights.
    """
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    found = [match for match in map(_WEIGHTS.fullmatch, names) if match]
    return {match["one"] or match["old"] or "" for match in found}


def select_variants(folder: Path, variant: str | None = None) -> dict[str, str]:
    """Component -> the variant that is read, "" for plain weights; of all that have weights.

    That is the one asked for where a component has it, else the plain one, else the only one.

    Args:
        folder: of a pipeline, with a folder for each component.
        variant: asked for; None: none.

    Raises:
        PipelineError: no component has the variant that is asked for; or one has several variants
            and no plain weights, and none is asked for.
    """
    known = {part.name: list_variants(part) for part in sorted(folder.iterdir()) if part.is_dir()}
    known = {part: variants for part, variants in known.items() if variants}
    everywhere = sorted(set().union(*known.values()) - {""})
    if variant is not None and known and variant not in everywhere:
        raise PipelineError(
            f"no component of the base has a variant {variant}",
            where=f"variant: {variant}",
            fix=suggest_names(variant, everywhere) if everywhere else "leave the variant out",
        )
    chosen = {}
    for part, variants in known.items():
        if variant is not None and variant in variants:
            chosen[part] = variant
        elif "" in variants:
            chosen[part] = ""
        elif len(variants) == 1:
            (chosen[part],) = variants
        else:
            raise PipelineError(
                f"the base's {part} has no plain weights, but the variants "
                + " and ".join(sorted(variants)),
                where=folder / part,
                fix=f"set variant to one of them (--variant {min(variants)})",
            )
    return chosen


def list_weight_files(folder: Path, variant: str) -> list[Path]:
    """The safetensors files of a component's variant; "": the plain ones.

    Raises:
        FileNotFoundError: it has none.
    """
    found = []
    for entry in sorted(folder.iterdir()):
        match = _WEIGHTS.fullmatch(entry.name)
        if match and (match["one"] or match["old"] or "") == variant:
            found.append(entry)
    for stem in _STEMS:  # a whole file is read, though shards of it may be there too
        name = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
        if folder / name in found:
            return [folder / name]
    if not found:
        raise FileNotFoundError(f"no safetensors in {folder}")
    return found


def local_folder(base: str) -> Path | None:
    """Where the base's files are on this machine."""
    if os.path.isdir(base):  # unlike Path.is_dir, also of names that are too long
        return Path(base)
    from huggingface_hub import try_to_load_from_cache

    for name in ("model_index.json", "modular_model_index.json"):
        try:
            index = try_to_load_from_cache(base, name)
        except Exception:  # no hub id
            return None
        if isinstance(index, str):
            return Path(index).parent
    return None

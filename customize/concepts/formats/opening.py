"""Opening what a user names: one of our concepts, or a LoRA from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from customize.concepts.concept import Concept
from customize.concepts.formats.lora import Adaptation, LoraFile, lora_file, published_kin
from customize.concepts.layout import INFO_FILE, INFO_HEADER, INPUTS_FILE, PEFT_FILES
from customize.concepts.reading import (
    located,
    parsed_single,
    read,
    read_json,
    read_single_tensors,
    refuse_pickles,
)
from customize.errors import ConceptError


def opened(source: str | Path) -> Concept | LoraFile:
    """Read a concept, or the file of a LoRA that no model has been asked about yet.

    Args:
        source: a folder, a ``.safetensors`` file or a hub id. A folder without ``concept.json`` is
            that of a LoRA where it has just one ``.safetensors`` file.

    Raises:
        ConceptError: nothing is there, it cannot be read whole, or it is a pickle.
    """
    path = located(source)
    if path.is_dir():
        if (path / INFO_FILE).is_file():
            return read(path)
        # A hub's folder is called by a commit, which is no name.
        name = str(source).rpartition("/")[2] if not Path(source).exists() else path.resolve().name
        path = _only_file(path)
    else:
        name = path.stem
    tensors, metadata = read_single_tensors(path)
    if INFO_HEADER in metadata:
        return parsed_single(tensors, metadata, path)
    return lora_file(name, path, tensors, metadata, _adapter_config(path))


def opened_whole(source: str | Path) -> Adaptation:
    """The same without a pipeline: a LoRA's layers are those of the published model it fits.

    Raises:
        ConceptError: see :func:`opened`; no published model has all its layers, or its updates
            depend on the base's weights.
    """
    found = opened(source)
    return found.lora(published_kin(found)) if isinstance(found, LoraFile) else found


def _only_file(folder: Path) -> Path:
    found = (file for file in folder.iterdir() if file.suffix == ".safetensors")
    files = sorted(file for file in found if not file.name.endswith(INPUTS_FILE))
    if len(files) == 1:
        return files[0]
    if not files:
        refuse_pickles(folder)
    raise ConceptError(
        f"the folder has no {INFO_FILE}"
        + (f" and {len(files)} files that may be a LoRA" if files else ""),
        where=folder,
        fix="name a folder that customize has written, or a single .safetensors file",
    )


def _adapter_config(path: Path) -> dict[str, Any] | None:
    """peft keeps rank and alpha in a file of their own beside the tensors."""
    weights, config = PEFT_FILES
    if path.name != weights or not (path.parent / config).is_file():
        return None
    values = read_json(path.parent / config)
    if not isinstance(values, dict):
        raise ConceptError(
            "the adapter's configuration is no JSON object",
            where=path.parent / config,
            fix="get the file anew",
        )
    return values

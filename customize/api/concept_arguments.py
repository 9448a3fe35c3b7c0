"""Reading the concepts that ``customize.merge`` and ``customize.inspect`` take as arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from customize.concepts.formats.open_adaptation import open_all_without_pipeline
from customize.concepts.types import Adaptation, Concept, Lora
from customize.errors import ConfigError


def read_concepts(
    concepts: Sequence[str | Path | Adaptation],
    family: str | None = None,
    ignore: str | Sequence[str] | None = None,
) -> list[Adaptation]:
    """Read folders and files; concepts in memory are returned as they are.

    Args:
        concepts: Folders, ``.safetensors`` files, hub ids, or concepts in memory.
        family: The model family of LoRA files whose layer names fit several families.
        ignore: Parts of the folders and files to leave out, as for :func:`customize.load_custom`.

    Returns:
        The concepts, in order.

    Raises:
        ConfigError: If an argument is neither a path nor a concept, or a family or part is unknown.
        ConceptError: If a concept cannot be read.
    """
    in_memory: dict[int, Adaptation] = {}
    sources: dict[int, str | Path] = {}
    for index, concept in enumerate(concepts):
        if isinstance(concept, Concept | Lora):
            in_memory[index] = concept
        elif isinstance(concept, str | Path):
            sources[index] = concept
        else:
            is_collection = isinstance(concept, list | tuple | set)
            raise ConfigError(
                f"a {type(concept).__name__} is not a concept",
                where="concepts",
                fix="unpack it with a star, as in merge(*concepts, output=...)"
                if is_collection
                else "give a folder, a .safetensors file, a hub id or a Concept",
            )
    opened = open_all_without_pipeline(list(sources.values()), family, ignore)
    read = in_memory | dict(zip(sources, opened, strict=True))
    return [read[index] for index in sorted(read)]

"""``customize.merge``: merge concepts and LoRAs into one LoRA on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from customize.api.concept_arguments import read_concepts
from customize.concepts.input_statistics import LayerInputs
from customize.concepts.io.file_layout import KEY_LAYOUTS
from customize.concepts.merge.choose_method import (
    AUTO,
    check_concept_count,
    choose_method,
    parse_method,
    read_record,
)
from customize.concepts.merge.component_weights import Weight, parse_weight
from customize.concepts.merge.write_merged_lora import MergeResult, write_merged
from customize.concepts.types import Adaptation
from customize.core.merges import MERGES
from customize.core.precision import full_precision
from customize.errors import ConfigError
from customize.families import published_families
from customize.near_names import suggest_names
from customize.text import plural

Weights = Sequence[float] | Mapping[str, Any] | None


@full_precision()
def merge(
    *concepts: str | Path | Adaptation,
    output: str | Path,
    weights: Weights = None,
    names: Sequence[str | None] | None = None,
    merge: str | Mapping[str, Any] = AUTO,
    rank: int | None = None,
    format: str = KEY_LAYOUTS[0],
    family: str | None = None,
    ignore: str | Sequence[str] | None = None,
) -> MergeResult:
    """Merge concepts and LoRAs into one ordinary LoRA in a new folder.

    ::

        customize.merge("concepts/rex", "concepts/tom", output="duo", weights=[1.0, 0.8])

    ``load_custom`` and all commands read the folder with the triggers of all concepts; its
    README.md describes how other programs load it. To fuse concepts into the weights of a pipeline,
    call ``load_custom(..., fuse=True)`` and ``save_pretrained``.

    Args:
        concepts: Folders, ``.safetensors`` files, hub ids, or concepts in memory.
        output: A new or empty folder, or one that contains the same merge already.
        weights: One weight for each concept, or a dict from names to weights as
            :func:`customize.load_custom` takes it; 1.0 by default.
        names: A new name for each of ``concepts``, or None to keep its name. The trigger of a
            renamed concept is the new name in angle brackets.
        merge: As for ``load_custom``: "auto", the name of a method, or a dict of a "method" and
            its settings.
        rank: The highest rank of any layer. None: the sum of the ranks, which is exact unless the
            method prunes.
        format: "diffusers", or "kohya" for ComfyUI and the web UIs.
        family: The model family of LoRA files whose layer names fit several families.
        ignore: Parts of the folders and files to leave out, as for ``load_custom``.

    Returns:
        The folder, the rank of each component, the method and the error of truncation.

    Raises:
        ConfigError: If a method, setting, format, family or part is unknown, the weights do not
            match the concepts, or a record that the method needs is missing.
        ConceptError: If a concept cannot be read, or the concepts do not fit one model.
        StorageError: If the folder contains something else, or cannot be written.
    """
    method, settings = parse_method(merge, "merge (--merge)")
    check_concept_count(method, len(concepts))
    if format not in KEY_LAYOUTS:
        raise ConfigError(
            f"unknown format {format}", where="format", fix=suggest_names(format, KEY_LAYOUTS)
        )
    opened = _rename_concepts(read_concepts(concepts, family, ignore), names)
    method, inputs = _find_records(opened, method)
    return write_merged(
        opened,
        _resolve_weights(weights, opened),
        output,
        method=method,
        settings=settings,
        inputs=inputs,
        rank=rank,
        layout=format,
    )


def _rename_concepts(
    concepts: Sequence[Adaptation], names: Sequence[str | None] | None
) -> list[Adaptation]:
    if names is None:
        return list(concepts)
    if isinstance(names, str) or len(names) != len(concepts):
        raise ConfigError(
            f"{names!r} does not name {plural(len(concepts), 'concept')}",
            where="names",
            fix="give a list with a name for each concept, or None to keep its name",
        )
    pairs = zip(concepts, names, strict=True)
    return [concept.renamed(name) if name else concept for concept, name in pairs]


def _find_records(concepts: Sequence[Adaptation], method: str) -> tuple[str, Sequence[LayerInputs]]:
    """Resolve "auto", and read the records that the method needs from beside the concepts.

    Raises:
        ConfigError: If a record that the method needs is missing.
    """
    chosen, records, missing = choose_method(method, concepts, {}, read_record)
    if not MERGES[chosen].needs_inputs:
        return chosen, ()
    if missing:
        names = ", ".join(concept.info.name for concept in missing)
        raise ConfigError(
            f"the layer inputs of {names} are not recorded, and the merge {chosen} needs them",
            where=f"merge {chosen} (--merge {chosen})",
            fix="record them with customize record, or choose the merge sum (--merge sum)",
        )
    return chosen, [records[concept.info.name] for concept in concepts]


def _resolve_weights(weights: Weights, concepts: Sequence[Adaptation]) -> list[Weight]:
    """Return the weight of each concept; blocks are those of the published models of the family.

    Raises:
        ConfigError: If a key is not the name of a concept, component or block.
    """
    if weights is None:
        return [1.0] * len(concepts)
    if not isinstance(weights, Mapping):
        return list(weights)
    names = [concept.info.name for concept in concepts]
    for name in weights:
        if name not in names:
            raise ConfigError(
                f"a weight is given for {name}, which is not among the concepts",
                where="weights (--weights)",
                fix=suggest_names(name, names),
            )
    layers: dict[str, list[str]] = {}
    denoisers: dict[str, None] = {}
    for family in published_families():
        if family.name == concepts[0].info.family:
            for component in family.adaptable:
                layers.setdefault(component, []).extend(family.layers(component))
            denoisers |= dict.fromkeys(family.denoisers)
    return [parse_weight(name, weights.get(name, 1.0), layers, list(denoisers)) for name in names]

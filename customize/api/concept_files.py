"""What the package offers for concepts as files: merging them into one, looking into them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import Tensor

from customize.concepts.adapter import flatten_layers
from customize.concepts.formats.lora import Adaptation, Lora
from customize.concepts.formats.open_adaptation import open_all_without_pipeline
from customize.concepts.input_statistics import LayerInputs, load_recorded_inputs
from customize.concepts.io.file_layout import KEY_LAYOUTS
from customize.concepts.io.write_merged_lora import MergeResult, write_merged
from customize.concepts.merge.component_weights import Weight, parse_weight
from customize.concepts.merge.merge_concepts import (
    AUTO,
    FUSION,
    METHODS,
    SUM,
    check_method,
    check_single_concept,
    choose_method,
    incompatibility,
    read_record,
    trained_together,
)
from customize.concepts.slices.overlap import find_overlaps
from customize.concepts.types import Concept
from customize.core import crosstalk
from customize.core.precision import full_precision
from customize.errors import ConfigError
from customize.families import published_families
from customize.near_names import suggest_names

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

    ``load_custom`` reads it back with the triggers of all concepts, and so do all commands; its
    README.md says how other programs load it. To put concepts into a pipeline's weights, call
    ``load_custom(..., fuse=True)`` and ``save_pretrained``.

    Args:
        concepts: Folders, ``.safetensors`` files, hub ids, or concepts that were read.
        output: A new or empty folder; it may also hold the very same merge.
        weights: One for each concept, or a dict by names as :func:`customize.load_custom` takes it;
            1.0 where left out.
        names: One for each of ``concepts``, which its trigger then is in angle brackets; None where
            it keeps its own.
        merge: As for ``load_custom``: "auto", "sum", "fusion" or another method, or a dict of a
            "method" and its settings.
        rank: The most that any layer may have; None: ranks add up, which is exact except where the
            method prunes.
        format: "diffusers", or "kohya" for ComfyUI and the web UIs.
        family: The name of the model family, for LoRA files whose layers several families have.
        ignore: Parts of the folders and files to leave out, as for ``load_custom``.

    Returns:
        The folder, the rank of each component, the method and what truncation lost.

    Raises:
        ConfigError: no such method, setting, format, family or part; weights that fit nothing.
        ConceptError: a concept cannot be read, or does not go with the others; a record that
            "fusion" needs is missing.
        StorageError: something else is in the folder, or it cannot be written.
    """
    method, settings = _parse_method(merge)
    if len(concepts) == 1:
        check_single_concept(method)
    check_method(SUM if method == AUTO else method, settings)
    if format not in KEY_LAYOUTS:
        raise ConfigError(
            f"there is no format {format}", where="format", fix=suggest_names(format, KEY_LAYOUTS)
        )
    opened = _rename_concepts(read_concepts(concepts, family, ignore), names)
    method, inputs = find_records(opened, method)
    return write_merged(
        opened,
        resolve_weights(weights, opened),
        output,
        method=method,
        settings=settings,
        inputs=inputs,
        rank=rank,
        layout=format,
    )


@dataclass(frozen=True, eq=False)
class Inspection:
    """What concepts hold, and how they get along; printed, it is a few lines for each.

    Attributes:
        facts: of each concept: title -> text.
        notes: what is known of how they get along, in words.
        overlap: (concepts, concepts), float: the cosine of each two updates over all layers, from 0
            to 1; None for a single concept, or where they are of different models.
        crosstalk: layer -> (concepts, concepts), float: how much the update of column j answers to
            the layer inputs of row i; empty where not all concepts have a record of these.
    """

    facts: Sequence[Mapping[str, str]]
    notes: Sequence[str] = ()
    overlap: Tensor | None = None
    crosstalk: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        lines = []
        for facts in self.facts:
            lines += [f"{title}: {text}" for title, text in facts.items()]
            lines.append("")
        lines += self.notes
        if self.overlap is not None:
            names = [facts["name"] for facts in self.facts]
            for i, j in combinations(range(len(names)), 2):
                overlap = float(self.overlap[i, j])
                lines.append(f"overlap of {names[i]} and {names[j]}: {overlap:.3f}")
        return "\n".join(lines).rstrip()


@full_precision()
def inspect(
    *concepts: str | Path | Adaptation,
    family: str | None = None,
    ignore: str | Sequence[str] | None = None,
) -> Inspection:
    """What concepts and LoRAs hold, and whether they get in each other's way.

    Args:
        concepts, family, ignore: as for :func:`customize.merge`; at least one concept.

    Raises:
        ConfigError: nothing is given, or there is no such family or part.
        ConceptError: a concept cannot be read.
    """
    if not concepts:
        raise ConfigError("there is nothing to inspect", fix="give at least one concept")
    opened = read_concepts(concepts, family, ignore)
    facts = [describe_concept(concept) for concept in opened]
    if len(opened) < 2:
        return Inspection(facts)
    strange = find_incompatibility(opened)
    if strange:
        return Inspection(facts, [f"They cannot be merged: {strange}."])
    updates = {str(k): flatten_layers(concept.updates) for k, concept in enumerate(opened)}
    overlap = crosstalk.overlap_matrix(updates)
    records = [load_recorded_inputs(c.info.name, c.updates, c.source) for c in opened]
    known = {str(k): flatten_layers(each.own) for k, each in enumerate(records) if each is not None}
    answers = crosstalk.response_norms(updates, known) if len(known) == len(opened) else {}
    return Inspection(facts, describe_relations(opened), overlap, answers)


def read_concepts(
    concepts: Sequence[str | Path | Adaptation],
    family: str | None,
    ignore: str | Sequence[str] | None = None,
) -> list[Adaptation]:
    """Concepts as they are, and what files and folders hold without what is to be left out.

    Raises:
        ConfigError: something is neither.
    """
    read: dict[int, Adaptation] = {}
    sources: dict[int, str | Path] = {}
    for number, each in enumerate(concepts):
        if isinstance(each, Concept | Lora):
            read[number] = each
        elif isinstance(each, str | Path):
            sources[number] = each
        else:
            several = isinstance(each, list | tuple | set)
            raise ConfigError(
                f"a {type(each).__name__} is not a concept",
                fix="unpack it with a star, as in merge(*concepts, output=...)"
                if several
                else "give a folder, a .safetensors file, a hub id or a Concept",
            )
    opened = open_all_without_pipeline(list(sources.values()), family, ignore)
    read |= dict(zip(sources, opened, strict=True))
    return [read[number] for number in sorted(read)]


def find_records(concepts: Sequence[Adaptation], method: str) -> tuple[str, Sequence[LayerInputs]]:
    """What "auto" comes to, and the records that the method needs, from beside the concepts.

    Raises:
        ConfigError: one is missing for "fusion".
    """
    found, records, lacking = choose_method(method, concepts, {}, read_record)
    if found != FUSION:
        return found, ()
    if lacking:
        raise ConfigError(
            "there is no record of what the layers of "
            f"{', '.join(concept.info.name for concept in lacking)} read",
            where="merge fusion (--merge fusion)",
            fix="make one with customize record, or choose the merge sum (--merge sum)",
        )
    return found, [records[concept.info.name] for concept in concepts]


def resolve_weights(given: Weights, concepts: Sequence[Adaptation]) -> list[Weight]:
    """The weight of each concept, where no pipeline is at hand: by the published model's blocks.

    Raises:
        ConfigError: a name is no concept's, component's or block's.
    """
    if given is None:
        return [1.0] * len(concepts)
    if not isinstance(given, Mapping):
        return list(given)
    names = [concept.info.name for concept in concepts]
    for name in given:
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
    return [parse_weight(name, given.get(name, 1.0), layers, list(denoisers)) for name in names]


def find_incompatibility(concepts: Sequence[Adaptation]) -> str:
    """Why two of the concepts cannot be merged; empty where all can."""
    pairs = combinations([concept.info for concept in concepts], 2)
    return next((text for a, b in pairs if (text := incompatibility(a, b))), "")


def describe_relations(concepts: Sequence[Adaptation]) -> list[str]:
    """What is known without a record of how concepts get along, in words."""
    if trained_together(concepts):
        return [
            "They were learned in one run: what it learned is their sum, as load_custom has it."
        ]
    colliding = [f"note: {found}" for found in find_overlaps(concepts)]
    plain = [concept.info.name for concept in concepts if concept.info.basis is None]
    if plain:
        return [
            *colliding,
            f"note: {', '.join(plain)} are ordinary LoRAs, without slices to keep apart.",
        ]
    return colliding or ["No two share a slice: their updates are orthogonal."]


def describe_concept(concept: Adaptation) -> dict[str, str]:
    """The facts on a concept: title -> text."""
    if isinstance(concept, Lora):
        return _describe_lora(concept)
    info = concept.info
    rows = {
        "name": info.name,
        "trigger": f"{info.trigger}, {info.num_tokens} tokens",
        "class": info.class_word,
        "base": f"{info.base} (family {info.family})",
        "method": info.method,
        **({"learned with": ", ".join(info.learned_with)} if info.learned_with else {}),
        "rank, alpha": f"{info.rank}, {info.alpha:g}",
        **_describe_sizes(concept),
        "embeddings": ", ".join(
            f"{' x '.join(map(str, rows.shape))} of {key}"
            for key, rows in concept.embeddings.items()
        )
        or "none",
    }
    if info.basis is not None:
        rows["orthogonal matrix"] = (
            f"{info.basis.kind}, seed {info.basis.seed}, scale {info.basis.scale:g}"
        )
        if info.basis.avoid:
            rows["shared directions"] = (
                f"{info.basis.avoid} avoided, recorded as {info.basis.shared}"
            )
        rows["slices"] = "; ".join(
            f"width {width}: {_format_columns(columns)}" for width, columns in info.slices.items()
        )
    rows |= {f"score: {name}": json.dumps(value) for name, value in info.scores.items()}
    return rows | {"made": info.created}


def _describe_lora(lora: Lora) -> dict[str, str]:
    ranks = sorted({update.rank for own in lora.updates.values() for update in own.values()})
    return {
        "name": lora.info.name,
        "trigger": lora.info.words or "none named",
        **{
            f"{each.trigger} calls": f"{each.name}, a {each.class_word}, {each.num_tokens} tokens"
            for each in lora.subjects
        },
        "base": f"{lora.info.base or 'not named'} (family {lora.info.family})",
        "method": "merged" if lora.subjects or lora.info.fingerprint else "a LoRA from elsewhere",
        "rank": " to ".join(map(str, dict.fromkeys((*ranks[:1], *ranks[-1:])))) or "none",
        **_describe_sizes(lora),
        **(
            {"biases and norms": _format_counts(lora.vector_updates)} if lora.vector_updates else {}
        ),
    }


def _describe_sizes(concept: Adaptation) -> dict[str, str]:
    parts = sorted(concept.updates.items())
    count = sum(p.up.numel() + p.down.numel() for _, own in parts for p in own.values())
    if isinstance(concept, Lora):
        count += sum(len(v.values) for own in concept.vector_updates.values() for v in own.values())
    return {"layers": _format_counts(concept.updates) or "none", "numbers": f"{count:,}"}


def _format_counts(parts: Mapping[str, Mapping[str, object]]) -> str:
    return ", ".join(f"{len(own)} of {part}" for part, own in sorted(parts.items()))


def _rename_concepts(
    concepts: Sequence[Adaptation], names: Sequence[str | None] | None
) -> list[Adaptation]:
    if names is None:
        return list(concepts)
    if isinstance(names, str) or len(names) != len(concepts):
        raise ConfigError(
            f"{names!r} does not name {len(concepts)} concepts",
            where="names",
            fix="give a list with a name for each, or None where it keeps its own",
        )
    pairs = zip(concepts, names, strict=True)
    return [concept.renamed(name) if name else concept for concept, name in pairs]


def _parse_method(merge: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    settings = dict(merge) if isinstance(merge, Mapping) else {"method": merge}
    method = settings.pop("method", None)
    methods = (AUTO, *METHODS)
    if method not in methods:
        raise ConfigError(
            f"there is no merge {method}",
            where="merge (--merge)",
            fix=suggest_names(method, methods),
        )
    return method, settings


def _format_columns(columns: Sequence[int]) -> str:
    """Column numbers with runs drawn together: 0-7, 12."""
    runs: list[list[int]] = []
    for column in sorted(columns):
        if runs and column == runs[-1][-1] + 1:
            runs[-1].append(column)
        else:
            runs.append([column])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)

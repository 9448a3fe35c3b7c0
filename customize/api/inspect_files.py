"""``customize.inspect``: the contents of concepts and LoRAs, and how they affect each other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import Tensor

from customize.api.concept_arguments import read_concepts
from customize.api.inspect_references import describe_references, is_references
from customize.concepts.adapter import flatten_layers
from customize.concepts.merge.choose_method import read_record, trained_together
from customize.concepts.merge.compatibility import incompatibility
from customize.concepts.slices.overlap import find_overlaps
from customize.concepts.types import Adaptation, Lora
from customize.core import crosstalk
from customize.core.precision import full_precision
from customize.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Inspection:
    """The contents of concepts, and how they affect each other; its repr is a printable report.

    Attributes:
        facts: For each concept, title -> text.
        notes: Sentences about how the concepts affect each other.
        overlap: (concepts, concepts), float: cosine similarity of two updates over all layers, from
            0 to 1; None for a single concept, or for concepts of different models.
        crosstalk: Layer -> (concepts, concepts), float: norm of the response of the update of
            column j to the recorded inputs of row i; empty unless all concepts have a record.
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
            names = [facts["name"] for facts in self.facts if "name" in facts]
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
    """Describe concepts and LoRAs, and measure how they affect each other.

    Args:
        concepts: At least one folder, ``.safetensors`` file, hub id, or concept in memory; also
            folders of reference models, EasyRef's file, and files of encoded groups of references.
        family: The model family of LoRA files whose layer names fit several families.
        ignore: Parts of the folders and files to leave out, as for :func:`customize.load_custom`.

    Returns:
        The facts on each concept and, for several, their overlap and crosstalk.

    Raises:
        ConfigError: If there is no concept, or a family or part is unknown.
        ConceptError: If a concept cannot be read.
    """
    if not concepts:
        raise ConfigError("there is nothing to inspect", fix="give at least one concept")
    rest, references = split_references(concepts)
    opened = read_concepts(rest, family, ignore) if rest else []
    facts = [describe_concept(concept) for concept in opened]
    facts += [describe_references(source) for source in references]
    if len(opened) < 2:
        return Inspection(facts)
    reason = find_incompatibility(opened)
    if reason:
        return Inspection(facts, [f"They cannot be merged: {reason}."])
    updates = {str(k): flatten_layers(concept.updates) for k, concept in enumerate(opened)}
    overlap = crosstalk.overlap_matrix(updates)
    records = [read_record(concept) for concept in opened]
    inputs = {str(k): flatten_layers(r.concept) for k, r in enumerate(records) if r is not None}
    responses = crosstalk.response_norms(updates, inputs) if len(inputs) == len(opened) else {}
    return Inspection(facts, describe_relations(opened), overlap, responses)


def split_references(sources: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return concepts and LoRAs, and what belongs to reference images, each in order."""
    references = [source for source in sources if is_references(source)]
    return [source for source in sources if not is_references(source)], references


def find_incompatibility(concepts: Sequence[Adaptation]) -> str:
    """Return why two of the concepts cannot be merged; empty if all can."""
    pairs = combinations([concept.info for concept in concepts], 2)
    return next((text for a, b in pairs if (text := incompatibility(a, b))), "")


def describe_relations(concepts: Sequence[Adaptation]) -> list[str]:
    """Return sentences about how concepts affect each other, from their metadata alone."""
    if trained_together(concepts):
        return ["They were trained in one run, which optimized their sum; load_custom adds them."]
    overlaps = [f"note: {overlap}" for overlap in find_overlaps(concepts)]
    plain = [concept.info.name for concept in concepts if concept.info.basis is None]
    if plain:
        return [
            *overlaps,
            f"note: ordinary LoRAs without reserved slices: {', '.join(plain)}.",
        ]
    return overlaps or ["No two concepts share a slice: their updates are orthogonal."]


def describe_concept(concept: Adaptation) -> dict[str, str]:
    """Return the facts on a concept: title -> text for a table."""
    if isinstance(concept, Lora):
        return _describe_lora(concept)
    info = concept.info
    rows = {
        "name": info.name,
        "trigger": f"{info.trigger}, {info.num_tokens} tokens",
        "class": info.class_word,
        "base": f"{info.base} (family {info.family})",
        "method": info.method,
        **({"trained with": ", ".join(info.trained_with)} if info.trained_with else {}),
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
        if info.basis.num_shared_directions:
            count, name = info.basis.num_shared_directions, info.basis.shared_directions
            rows["shared directions"] = f"{count} avoided, recorded as {name}"
        rows["slices"] = "; ".join(
            f"width {width}: {_format_columns(columns)}" for width, columns in info.slices.items()
        )
    rows |= {f"score: {name}": json.dumps(value) for name, value in info.scores.items()}
    return rows | {"created": info.created}


def _describe_lora(lora: Lora) -> dict[str, str]:
    ranks = sorted({update.rank for layers in lora.updates.values() for update in layers.values()})
    return {
        "name": lora.info.name,
        "trigger": lora.info.trigger_words or "none",
        **{
            f"trigger {subject.trigger}": f"{subject.name}, a {subject.class_word}, "
            f"{subject.num_tokens} tokens"
            for subject in lora.subjects
        },
        "base": f"{lora.info.base or 'unknown'} (family {lora.info.family})",
        "method": "merged" if lora.subjects or lora.info.fingerprint else "imported LoRA",
        "rank": " to ".join(map(str, dict.fromkeys((*ranks[:1], *ranks[-1:])))) or "none",
        **_describe_sizes(lora),
        **(
            {"biases and norms": _format_counts(lora.vector_updates)} if lora.vector_updates else {}
        ),
    }


def _describe_sizes(concept: Adaptation) -> dict[str, str]:
    updates = [update for layers in concept.updates.values() for update in layers.values()]
    count = sum(update.up.numel() + update.down.numel() for update in updates)
    if isinstance(concept, Lora):
        vectors = (v for layers in concept.vector_updates.values() for v in layers.values())
        count += sum(len(vector.values) for vector in vectors)
    return {"layers": _format_counts(concept.updates) or "none", "parameters": f"{count:,}"}


def _format_counts(parts: Mapping[str, Mapping[str, object]]) -> str:
    return ", ".join(f"{len(layers)} of {part}" for part, layers in sorted(parts.items()))


def _format_columns(columns: Sequence[int]) -> str:
    """Format column numbers, with runs as ranges: 0-7, 12."""
    runs: list[list[int]] = []
    for column in sorted(columns):
        if runs and column == runs[-1][-1] + 1:
            runs[-1].append(column)
        else:
            runs.append([column])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)

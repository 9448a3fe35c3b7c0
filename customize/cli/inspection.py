"""``customize inspect``: what concepts hold, and how they get along."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from customize.cli.shared import console
from customize.concepts.adapter import file_name
from customize.concepts.formats.lora import Adaptation, Lora
from customize.concepts.formats.opening import opened_whole
from customize.concepts.inputs import LayerInputs, record_beside
from customize.concepts.merge import strangers
from customize.concepts.slices import collisions
from customize.core.crosstalk import answers, matrix, relative
from customize.core.lowrank import LowRank

# From here on a second update changes what the first one draws.
LOUD = 0.5


def run(sources: Sequence[str]) -> None:
    """Print a table a concept; for several, their collisions and how they disturb one another."""
    concepts = [opened_whole(source) for source in sources]
    out = console()
    for source, concept in zip(sources, concepts, strict=True):
        table = Table(title=escape(source), show_header=False, title_justify="left")
        for title, text in described(concept).items():
            table.add_row(title, escape(text))
        out.print(table)
    if len(concepts) < 2:
        return
    pairs = combinations([concept.info for concept in concepts], 2)
    strange = next((text for a, b in pairs if (text := strangers(a, b))), "")
    if strange:
        out.print(f"They cannot be merged: {strange}.", markup=False, soft_wrap=True)
        return
    found = collisions([concept.info for concept in concepts])
    for collision in found:
        out.print(f"note: {collision}", markup=False, soft_wrap=True)
    plain = [concept.info.name for concept in concepts if concept.info.basis is None]
    if plain:
        out.print(
            f"note: {', '.join(plain)} are ordinary LoRAs, without slices to keep apart.",
            markup=False,
            soft_wrap=True,
        )
    if not found and not plain:
        out.print("No two share a slice: their updates are orthogonal.", markup=False)
    out.print(_overlaps(concepts))
    records = [record_beside(c.info.name, c.products, c.source) for c in concepts]
    known = [record for record in records if record is not None]
    if len(known) < len(concepts):
        lacking = [c.info.name for c, r in zip(concepts, records, strict=True) if r is None]
        out.print(
            f"There is no record of what the layers of {', '.join(lacking)} read, by which one "
            "could tell how loudly each answers to the others' prompts: make it with customize "
            "record.",
            markup=False,
            soft_wrap=True,
        )
        return
    by_layer = answers(_flat(concepts), _flat_inputs(concepts, known))
    out.print(_crosstalk(_labels(concepts), relative(by_layer)))
    for line in verdicts([concept.info.name for concept in concepts], by_layer):
        out.print(line, markup=False, soft_wrap=True)


def described(concept: Adaptation) -> dict[str, str]:
    """The facts on a concept: title -> text."""
    if isinstance(concept, Lora):
        return _described_lora(concept)
    info = concept.info
    rows = {
        "name": info.name,
        "trigger": f"{info.trigger}, {info.num_tokens} tokens",
        "class": info.class_word,
        "base": f"{info.base} (family {info.family})",
        "method": info.method,
        "rank, alpha": f"{info.rank}, {info.alpha:g}",
        **_sizes(concept),
        "embeddings": ", ".join(
            f"{' x '.join(map(str, rows.shape))} of {key}"
            for key, rows in concept.embeddings.items()
        )
        or "none",
    }
    if info.basis is not None:
        rows["basis"] = f"{info.basis.kind}, seed {info.basis.seed}, scale {info.basis.scale:g}"
        if info.basis.avoid:
            rows["basis"] += f", {info.basis.avoid} directions avoided ({info.basis.shared})"
        rows["slices"] = "; ".join(
            f"width {width}: {_ranges(columns)}" for width, columns in info.slices.items()
        )
    rows |= {f"score: {name}": json.dumps(value) for name, value in info.scores.items()}
    return rows | {"made": info.created}


def _described_lora(lora: Lora) -> dict[str, str]:
    ranks = sorted({update.rank for own in lora.products.values() for update in own.values()})
    return {
        "name": lora.info.name,
        "trigger": lora.info.words or "none named",
        "base": f"{lora.info.base or 'not named'} (family {lora.info.family})",
        "method": "a LoRA from elsewhere",
        "rank": str(*ranks) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        **_sizes(lora),
    }


def _sizes(concept: Adaptation) -> dict[str, str]:
    parts = sorted(concept.products.items())
    count = sum(p.up.numel() + p.down.numel() for _, own in parts for p in own.values())
    layers = ", ".join(f"{len(own)} of {part}" for part, own in parts)
    return {"layers": layers, "numbers": f"{count:,}"}


def verdicts(names: Sequence[str], by_layer: Mapping[str, Tensor]) -> list[str]:
    """What each pair's crosstalk means for a plain sum at weight 1, in words.

    In a layer, an answer is loud that is so against the concept's own, both there and on average.
    """
    if not by_layer:
        return ["No layer is changed by all of them: nothing can be said of their prompts."]
    lines = []
    layers = torch.stack(list(by_layer.values()))
    own = layers.diagonal(dim1=1, dim2=2)
    bar = LOUD * torch.maximum(own, own.square().mean(0).sqrt())
    overall = relative(by_layer)
    for i, j in combinations(range(len(names)), 2):
        loud = int(((layers[:, i, j] > bar[:, i]) | (layers[:, j, i] > bar[:, j])).sum())
        most = float(torch.maximum(overall[i, j], overall[j, i]))
        told = (
            f"{names[i]} and {names[j]}: one answers to the other's prompts {most:.2f} times as "
            f"loudly as that itself, and more than {LOUD:g} times in {loud} of {len(layers)} layers"
        )
        fix = ": a sum would blend them; merge them by fusion." if most > LOUD else "."
        lines.append(told + fix)
    return lines


def _labels(concepts: Sequence[Adaptation]) -> list[str]:
    return [f"{number}. {concept.info.name}" for number, concept in enumerate(concepts, start=1)]


def _flat(concepts: Sequence[Adaptation]) -> dict[str, Mapping[str, LowRank]]:
    return {
        label: {
            f"{part}.{file_name(part, module)}": update
            for part, own in concept.products.items()
            for module, update in own.items()
        }
        for label, concept in zip(_labels(concepts), concepts, strict=True)
    }


def _flat_inputs(
    concepts: Sequence[Adaptation], records: Sequence[LayerInputs]
) -> dict[str, Mapping[str, Tensor]]:
    return {
        label: {
            f"{part}.{module}": rows
            for part, own in each.own.items()
            for module, rows in own.items()
        }
        for label, each in zip(_labels(concepts), records, strict=True)
    }


def _overlaps(concepts: Sequence[Adaptation]) -> Table:
    labels = _labels(concepts)
    return _square("overlap of updates", labels, labels, matrix(_flat(concepts)))


def _crosstalk(labels: Sequence[str], values: Tensor) -> Table:
    rows = [f"on the prompts of {label}" for label in labels]
    return _square("what an update does, against the concept's own", rows, labels, values)


def _square(title: str, rows: Sequence[str], columns: Sequence[str], values: Tensor) -> Table:
    table = Table(title, *columns, title_justify="left")
    for label, row in zip(rows, values.tolist(), strict=True):
        table.add_row(label, *(f"{value:.3f}" for value in row))
    return table


def _ranges(columns: Sequence[int]) -> str:
    """Column numbers with runs drawn together: 0-7, 12."""
    runs: list[list[int]] = []
    for column in sorted(columns):
        if runs and column == runs[-1][-1] + 1:
            runs[-1].append(column)
        else:
            runs.append([column])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)

"""``customize inspect``: what concepts hold, and how they get along."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from customize.api.inspect_files import describe_concept, describe_relations, find_incompatibility
from customize.atomic import write_atomic
from customize.cli.command_support import check_png, console
from customize.concepts.adapter import flatten_layers
from customize.concepts.formats.open_adaptation import open_all_without_pipeline
from customize.concepts.input_statistics import load_recorded_inputs
from customize.concepts.merge.choose_method import trained_together
from customize.concepts.types import Adaptation
from customize.core.crosstalk import overlap_matrix, relative_responses, response_norms
from customize.core.lowrank import LowRank
from customize.errors import ConfigError, storage_error
from customize.text import one_line

# From here on a second update changes what the first one draws.
LOUD = 0.5


def run(
    sources: Sequence[str],
    *,
    layers: bool,
    plot: Path | None,
    family: str | None = None,
    ignore: Sequence[str] = (),
) -> None:
    """Print a table a concept; for several, their collisions and how they disturb one another.

    Args:
        layers: also how loudly each answers to another's prompts in each layer.
        plot: where a picture of all that goes.
        family: the name of the model family of LoRA files that fit several.
        ignore: parts of files to leave out.
    """
    check_png(plot, "--plot")
    concepts = open_all_without_pipeline(sources, family, ignore)
    records = [load_recorded_inputs(c.info.name, c.updates, c.source) for c in concepts]
    known = [record for record in records if record is not None]
    lacking = [c.info.name for c, r in zip(concepts, records, strict=True) if r is None]
    if layers or plot is not None:
        _check_drawable("--plot" if plot is not None else "--layers", len(concepts), lacking)
    out = console()
    for source, concept in zip(sources, concepts, strict=True):
        table = Table(title=one_line(source), show_header=False, title_justify="left")
        for title, text in describe_concept(concept).items():
            table.add_row(title, one_line(text))
        out.print(table)
    if len(concepts) < 2:
        return
    strange = find_incompatibility(concepts)
    if strange:
        out.print(f"They cannot be merged: {strange}.", markup=False, soft_wrap=True)
        return
    for note in describe_relations(concepts):
        out.print(note, markup=False, soft_wrap=True)
    out.print(_overlaps(concepts))
    if lacking:
        out.print(
            f"There is no record of what the layers of {', '.join(lacking)} read, by which one "
            "could tell how loudly each answers to the others' prompts: make it with customize "
            "record.",
            markup=False,
            soft_wrap=True,
        )
        return
    inputs = [flatten_layers(record.concept) for record in known]
    found = response_norms(_updates(concepts), dict(zip(_labels(concepts), inputs, strict=True)))
    by_layer = {layer: found[layer] for layer in sorted(found, key=_in_order)}
    overall, names = relative_responses(by_layer), [concept.info.name for concept in concepts]
    if by_layer:
        out.print(_crosstalk(_labels(concepts), overall))
    if layers and by_layer:
        out.print(_by_layer(names, by_layer))
    if not trained_together(concepts):
        for line in describe_crosstalk(names, by_layer):
            out.print(line, markup=False, soft_wrap=True)
    if plot is not None and by_layer:
        plot_crosstalk(names, overall, by_layer, plot)
        out.print(f"The picture is in {plot}.", markup=False, soft_wrap=True)


def _check_drawable(flag: str, count: int, lacking: Sequence[str]) -> None:
    if count < 2:
        raise ConfigError("one concept has nothing to disturb", where=flag, fix="give two or more")
    if lacking:
        raise ConfigError(
            f"there is no record of what the layers of {', '.join(lacking)} read",
            where=flag,
            fix="make it with customize record, or leave the flag out",
        )


def describe_crosstalk(names: Sequence[str], by_layer: Mapping[str, Tensor]) -> list[str]:
    """What each pair's crosstalk means for a plain sum at weight 1, in words.

    In a layer, an answer is loud that is so against the concept's own, both there and on average.
    """
    if not by_layer:
        return ["No layer is changed by all of them: nothing can be said of their prompts."]
    lines = []
    pairs, values = relative_crosstalk(names, by_layer)
    above = dict(zip(pairs, (values > LOUD).T, strict=True))
    overall = relative_responses(by_layer)
    for i, j in combinations(range(len(names)), 2):
        one, other = f"{names[j]} on {names[i]}", f"{names[i]} on {names[j]}"
        loud = int((above[one] | above[other]).sum())
        most = float(torch.maximum(overall[i, j], overall[j, i]))
        told = (
            f"{names[i]} and {names[j]}: one answers to the other's prompts {most:.2f} times as "
            f"loudly as that itself, and more than {LOUD:g} times in {loud} of {len(by_layer)} "
            "layers"
        )
        fix = ": a sum would blend them; merge them by fusion." if most > LOUD else "."
        lines.append(told + fix)
    return lines


def relative_crosstalk(
    names: Sequence[str], by_layer: Mapping[str, Tensor]
) -> tuple[list[str], Tensor]:
    """How loudly each update answers to another's inputs, layer by layer.

    Returns:
        The ordered pairs, "tom on rex" for what tom's update does on rex's prompts, and (layers,
        pairs): against rex's own there, or its average over layers where that is more, so that
        layers in which rex itself does next to nothing do not stand out.
    """
    each = torch.stack(list(by_layer.values()))
    own = each.diagonal(dim1=1, dim2=2)
    bar = torch.maximum(own, own.square().mean(0).sqrt())
    pairs = list(permutations(range(len(names)), 2))
    told = [f"{names[j]} on {names[i]}" for i, j in pairs]
    columns = [torch.where(bar[:, i] > 0, each[:, i, j] / bar[:, i], 0.0) for i, j in pairs]
    return told, torch.stack(columns, dim=1)


def plot_crosstalk(
    names: Sequence[str], overall: Tensor, by_layer: Mapping[str, Tensor], path: Path
) -> None:
    """Heat maps of crosstalk over all layers, and layer by layer.

    Raises:
        StorageError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    pairs, values = relative_crosstalk(names, by_layer)
    tall = max(4.0, 0.16 * len(by_layer) + 1.6)
    figure = Figure(figsize=(5.5 + 0.9 * len(names) + 0.5 * len(pairs), tall), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(len(names) + 1, len(pairs) + 1))
    look: dict[str, Any] = {"vmin": 0.0, "vmax": 1.0, "cmap": "magma"}
    left.imshow(overall.numpy(), **look)
    left.set_title("over all layers")
    left.set_xticks(range(len(names)), [f"{name}'s update" for name in names], rotation=45)
    left.set_yticks(range(len(names)), [f"on {name}'s prompts" for name in names])
    for i, row in enumerate(overall.tolist()):
        for j, value in enumerate(row):
            left.text(j, i, f"{value:.2f}", ha="center", color="black" if value > 0.6 else "white")
    image = right.imshow(values.numpy(), aspect="auto", **look)
    right.set_title("layer by layer")
    right.set_xticks(range(len(pairs)), pairs, rotation=45, ha="right")
    right.set_yticks(range(len(by_layer)), list(by_layer), fontsize=6)
    figure.colorbar(
        image, ax=[left, right], extend="max", label="times as loud as the concept's own update"
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise storage_error(error, path) from error


def _by_layer(names: Sequence[str], by_layer: Mapping[str, Tensor]) -> Table:
    pairs, values = relative_crosstalk(names, by_layer)
    table = Table(title_justify="left")
    table.add_column("layer", overflow="fold", min_width=30)
    for pair in pairs:
        table.add_column(pair)
    for layer, row in zip(by_layer, values.tolist(), strict=True):
        cells = [Text(f"{v:.2f}", "bold" if v > LOUD else "") for v in row]
        table.add_row(one_line(layer), *cells)
    return table


def _in_order(layer: str) -> list[tuple[int, str]]:
    """Layers as the model has them: block 2 comes before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in layer.split(".")]


def _labels(concepts: Sequence[Adaptation]) -> list[str]:
    return [f"{number}. {concept.info.name}" for number, concept in enumerate(concepts, start=1)]


def _updates(concepts: Sequence[Adaptation]) -> dict[str, dict[str, LowRank]]:
    products = [flatten_layers(concept.updates) for concept in concepts]
    return dict(zip(_labels(concepts), products, strict=True))


def _overlaps(concepts: Sequence[Adaptation]) -> Table:
    labels = _labels(concepts)
    return _square("overlap of updates", labels, labels, overlap_matrix(_updates(concepts)))


def _crosstalk(labels: Sequence[str], values: Tensor) -> Table:
    rows = [f"on the prompts of {label}" for label in labels]
    return _square("what an update does, against the concept's own", rows, labels, values)


def _square(title: str, rows: Sequence[str], columns: Sequence[str], values: Tensor) -> Table:
    table = Table(title, *columns, title_justify="left")
    for label, row in zip(rows, values.tolist(), strict=True):
        table.add_row(label, *(f"{value:.3f}" for value in row))
    return table

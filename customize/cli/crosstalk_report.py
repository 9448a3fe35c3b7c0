"""Overlap and crosstalk of concepts, as terminal tables, sentences and heat maps."""

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

from customize.atomic import write_atomic
from customize.concepts.adapter import flatten_layers
from customize.concepts.types import Adaptation
from customize.core.crosstalk import overlap_matrix, relative_responses, response_norms
from customize.core.lowrank import LowRank
from customize.errors import storage_error
from customize.text import one_line

#: Relative crosstalk above which a plain sum visibly changes the other concept.
MAX_CROSSTALK = 0.5


def measure_crosstalk(
    concepts: Sequence[Adaptation], inputs: Sequence[Mapping[str, Mapping[str, Tensor]]]
) -> dict[str, Tensor]:
    """Measure the norms of each concept's update on each concept's layer inputs.

    Args:
        concepts: The n concepts.
        inputs: Recorded inputs of each concept: component -> module -> (rows, width).

    Returns:
        Layer -> (n, n), entry [i, j] for update j on the inputs of concept i; layers that all
        concepts change, in the order of the model.
    """
    labels = _labels(concepts)
    rows = dict(zip(labels, map(flatten_layers, inputs), strict=True))
    norms = response_norms(_updates(concepts), rows)
    return {layer: norms[layer] for layer in sorted(norms, key=_natural_order)}


def relative_crosstalk(
    names: Sequence[str], by_layer: Mapping[str, Tensor]
) -> tuple[list[str], Tensor]:
    """Return the crosstalk of each ordered pair in each layer, relative to the concept's update.

    The reference is the norm of the concept's own update in the layer, or its root mean square
    over layers if that is larger. Otherwise, layers that the concept hardly changes would have the
    largest crosstalk.

    Args:
        names: Names of the n concepts.
        by_layer: Norms from :func:`measure_crosstalk`.

    Returns:
        The n (n - 1) pairs, "tom on rex" for tom's update on rex's inputs, and (layers, pairs).
    """
    norms = torch.stack(list(by_layer.values()))
    diagonal = norms.diagonal(dim1=1, dim2=2)
    reference = torch.maximum(diagonal, diagonal.square().mean(0).sqrt())
    pairs = list(permutations(range(len(names)), 2))
    titles = [f"{names[j]} on {names[i]}" for i, j in pairs]
    columns = [
        torch.where(reference[:, i] > 0, norms[:, i, j] / reference[:, i], 0.0) for i, j in pairs
    ]
    return titles, torch.stack(columns, dim=1)


def describe_crosstalk(names: Sequence[str], by_layer: Mapping[str, Tensor]) -> list[str]:
    """Return a sentence for each pair with its crosstalk and whether to merge by fusion."""
    if not by_layer:
        return ["Crosstalk is unknown: no layer is changed by all concepts."]
    lines = []
    pairs, values = relative_crosstalk(names, by_layer)
    exceeds = dict(zip(pairs, (values > MAX_CROSSTALK).T, strict=True))
    overall = relative_responses(by_layer)
    for i, j in combinations(range(len(names)), 2):
        first, second = f"{names[j]} on {names[i]}", f"{names[i]} on {names[j]}"
        count = int((exceeds[first] | exceeds[second]).sum())
        highest = float(torch.maximum(overall[i, j], overall[j, i]))
        line = (
            f"{names[i]} and {names[j]}: crosstalk {highest:.2f}, above {MAX_CROSSTALK:g} in "
            f"{count} of {len(by_layer)} layers"
        )
        advice = (
            ". A sum would blend them; merge them by fusion." if highest > MAX_CROSSTALK else "."
        )
        lines.append(line + advice)
    return lines


def overlap_table(concepts: Sequence[Adaptation]) -> Table:
    """The overlap of each two updates, 0 to 1."""
    labels = _labels(concepts)
    return _square_table("overlap of updates", labels, labels, overlap_matrix(_updates(concepts)))


def crosstalk_table(concepts: Sequence[Adaptation], by_layer: Mapping[str, Tensor]) -> Table:
    """The crosstalk over all layers, relative to each concept's own update."""
    labels = _labels(concepts)
    rows = [f"inputs of {label}" for label in labels]
    return _square_table("crosstalk", rows, labels, relative_responses(by_layer))


def layer_table(names: Sequence[str], by_layer: Mapping[str, Tensor]) -> Table:
    """The crosstalk of each pair in each layer, in bold above :data:`MAX_CROSSTALK`."""
    pairs, values = relative_crosstalk(names, by_layer)
    table = Table(title_justify="left")
    table.add_column("layer", overflow="fold", min_width=30)
    for pair in pairs:
        table.add_column(pair)
    for layer, row in zip(by_layer, values.tolist(), strict=True):
        cells = [Text(f"{value:.2f}", "bold" if value > MAX_CROSSTALK else "") for value in row]
        table.add_row(one_line(layer), *cells)
    return table


def plot_crosstalk(names: Sequence[str], by_layer: Mapping[str, Tensor], path: Path) -> None:
    """Write heat maps of the crosstalk over all layers and layer by layer as a PNG.

    Raises:
        StorageError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    overall = relative_responses(by_layer)
    pairs, values = relative_crosstalk(names, by_layer)
    height = max(4.0, 0.16 * len(by_layer) + 1.6)
    width = 5.5 + 0.9 * len(names) + 0.5 * len(pairs)
    figure = Figure(figsize=(width, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(len(names) + 1, len(pairs) + 1))
    style: dict[str, Any] = {"vmin": 0.0, "vmax": 1.0, "cmap": "magma"}
    left.imshow(overall.numpy(), **style)
    left.set_title("all layers")
    left.set_xticks(range(len(names)), [f"update of {name}" for name in names], rotation=45)
    left.set_yticks(range(len(names)), [f"inputs of {name}" for name in names])
    for i, row in enumerate(overall.tolist()):
        for j, value in enumerate(row):
            left.text(j, i, f"{value:.2f}", ha="center", color="black" if value > 0.6 else "white")
    image = right.imshow(values.numpy(), aspect="auto", **style)
    right.set_title("layer by layer")
    right.set_xticks(range(len(pairs)), pairs, rotation=45, ha="right")
    right.set_yticks(range(len(by_layer)), list(by_layer), fontsize=6)
    figure.colorbar(
        image, ax=[left, right], extend="max", label="norm relative to the concept's own update"
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise storage_error(error, path) from error


def _natural_order(layer: str) -> list[tuple[int, str]]:
    """Sort key of layer names: block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in layer.split(".")]


def _labels(concepts: Sequence[Adaptation]) -> list[str]:
    return [f"{number}. {concept.info.name}" for number, concept in enumerate(concepts, start=1)]


def _updates(concepts: Sequence[Adaptation]) -> dict[str, dict[str, LowRank]]:
    products = [flatten_layers(concept.updates) for concept in concepts]
    return dict(zip(_labels(concepts), products, strict=True))


def _square_table(title: str, rows: Sequence[str], columns: Sequence[str], values: Tensor) -> Table:
    table = Table(title, *columns, title_justify="left")
    for label, row in zip(rows, values.tolist(), strict=True):
        table.add_row(label, *(f"{value:.3f}" for value in row))
    return table

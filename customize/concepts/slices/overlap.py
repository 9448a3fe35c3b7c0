"""Overlaps of concepts' slices, measured by comparing their down-projections.

The facts have the orthogonal matrix, the shared directions and the numbers of the columns. Two
recordings of the same directions differ by rounding, so that columns of the same numbers may be
equal to seven digits, or entirely different if directions of nearly equal energy were rotated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from customize.concepts.adapter import flatten_layers
from customize.concepts.slices.allocation import (
    Collision,
    SliceOwner,
    shared_columns_collision,
    unrelated_basis_collision,
)
from customize.concepts.types import Adaptation, Concept
from customize.core.crosstalk import row_overlap

# Share of a row's energy in the other slice from which the row counts as shared: 26 degrees.
_SHARED = 0.81
# Overlap relative to random slices, above which slices collide.
_OVERLAP = 0.25
# Number of layers of a component and width that are compared; they nearly always agree.
_LAYERS = 16

#: "component.module" -> (rank, in).
DownProjections = Mapping[str, Tensor]

_CACHE: WeakKeyDictionary[Concept, WeakKeyDictionary[Concept, list[Collision]]] = (
    WeakKeyDictionary()
)


def find_overlaps(concepts: Sequence[Adaptation]) -> list[Collision]:
    """Every pair of concepts whose slices overlap.

    Concepts of the method "lora" have no slices and are left out. Results are cached as long as
    both concepts are in memory.
    """
    sliced = [c for c in concepts if isinstance(c, Concept) and c.info.basis is not None]
    pairs = list(combinations(sliced, 2))
    if any(b not in _CACHE.get(a, ()) for a, b in pairs):
        downs = [down_projections(concept) for concept in sliced]
        collisions = overlapping_pairs([concept.info for concept in sliced], downs)
        for (i, a), (j, b) in combinations(enumerate(sliced), 2):
            cached = _CACHE.setdefault(a, WeakKeyDictionary())
            cached[b] = [collisions[i, j]] if (i, j) in collisions else []
    return [collision for a, b in pairs for collision in _CACHE[a][b]]


def down_projections(concept: Concept, layers: int = _LAYERS) -> dict[str, Tensor]:
    """A concept's down-projections in some layers of each component and width.

    Args:
        concept: The concept.
        layers: Number of layers per component and width, spread over the model.

    Returns:
        "component.module" -> (rank, in), float32 copies on the CPU.
    """
    groups: dict[tuple[str, int], list[str]] = {}
    updates = flatten_layers(concept.updates)
    for name, update in sorted(updates.items()):
        groups.setdefault((name.partition(".")[0], update.shape[1]), []).append(name)
    chosen = [
        names[len(names) * number // min(layers, len(names))]
        for names in groups.values()
        for number in range(min(layers, len(names)))
    ]
    return {name: updates[name].down.detach().to("cpu", torch.float32) for name in chosen}


@dataclass
class _PairStatistics:
    """Statistics over layers, for each ordered pair of K concepts.

    Attributes:
        overlap: (K, K), sum over layers of the overlap relative to random slices.
        layers: (K, K), number of layers that both have.
        shared: Width -> (sum of ranks, K), whether a row is in another concept's slice.
    """

    overlap: Tensor
    layers: Tensor
    shared: dict[int, Tensor] = field(default_factory=dict)


def overlapping_pairs(
    infos: Sequence[SliceOwner], downs: Sequence[DownProjections]
) -> dict[tuple[int, int], Collision]:
    """All pairs of concepts whose down-projections share columns, or overlap like random ones.

    Args:
        infos: The facts of each concept; all have slices.
        downs: Each concept's down-projections, of the same layers if it has them.

    Returns:
        (i, j), the indices of two concepts with i < j -> collision.
    """
    statistics = _compare(infos, downs)
    starts = torch.tensor([0, *(info.rank for info in infos)]).cumsum(0).tolist()
    collisions = {}
    for i, j in combinations(range(len(infos)), 2):
        a, b = infos[i], infos[j]
        if not statistics.layers[i, j]:
            continue
        columns = {}
        for width, rows in sorted(statistics.shared.items()):
            hits = rows[starts[i] : starts[i + 1], j].nonzero().flatten().tolist()
            if hits:
                columns[width] = tuple(sorted(a.slices[str(width)][row] for row in hits))
        if columns:
            collisions[i, j] = shared_columns_collision(a, b, columns)
        elif (overlap := float(statistics.overlap[i, j] / statistics.layers[i, j])) > _OVERLAP:
            collisions[i, j] = unrelated_basis_collision(a, b, overlap)
    return collisions


def _compare(infos: Sequence[SliceOwner], downs: Sequence[DownProjections]) -> _PairStatistics:
    count, ranks = len(infos), torch.tensor([info.rank for info in infos])
    starts = ranks.cumsum(0) - ranks
    pairs = _PairStatistics(*torch.zeros(2, count, count, dtype=torch.float32))
    for layer in dict.fromkeys(name for projections in downs for name in projections):
        owners = [number for number, projections in enumerate(downs) if layer in projections]
        if len(owners) < 2:
            continue
        width = downs[owners[0]][layer].shape[1]
        # In another model, a layer of this name may have another width.
        owners = [number for number in owners if downs[number][layer].shape[1] == width]
        shares = row_overlap([downs[number][layer] for number in owners])
        index = torch.tensor(owners)
        owner_ranks = ranks[index]
        block = torch.repeat_interleave(torch.arange(len(owners)), owner_ranks)
        energy = torch.zeros_like(shares[: len(owners)]).index_add_(0, block, shares)
        smaller = torch.minimum(owner_ranks[:, None], owner_ranks[None, :])
        larger = torch.maximum(owner_ranks[:, None], owner_ranks[None, :])
        grid = (index[:, None], index[None, :])
        pairs.overlap[grid] += energy / smaller * width / larger
        pairs.layers[grid] += 1
        rows = torch.cat([starts[number] + torch.arange(int(ranks[number])) for number in owners])
        if width not in pairs.shared:
            pairs.shared[width] = torch.zeros(int(ranks.sum()), count, dtype=torch.bool)
        pairs.shared[width][rows[:, None], index[None, :]] |= shares > _SHARED
    return pairs

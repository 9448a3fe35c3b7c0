"""Which concepts' slices overlap, by their columns themselves and not by what their facts say.

The facts name the orthogonal matrix, the directions that are avoided and the columns' numbers. Two
recordings of the same directions differ by rounding, and then numbers tell nothing for certain: a
layer's columns can be the same to seven digits, or, where directions of nearly equal energy were
turned among one another, others altogether. So the down-projections are compared.
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

# A row is shared where this much of it lies in the other slice: within 26 degrees.
_SHARED = 0.81
# Slices that overlap by less than this share of what random ones do disturb each other little.
_OVERLAP = 0.25
# Layers of a width that are compared; those of one width nearly always agree.
_LAYERS = 16

#: "component.module" -> (rank, in).
DownProjections = Mapping[str, Tensor]

_KNOWN: WeakKeyDictionary[Concept, WeakKeyDictionary[Concept, list[Collision]]] = (
    WeakKeyDictionary()
)


def find_overlaps(concepts: Sequence[Adaptation]) -> list[Collision]:
    """Every pair of concepts whose slices overlap.

    Concepts of the method "lora" have no slices to keep apart and are left out. What was compared
    once is remembered as long as both concepts are in memory.
    """
    sliced = [c for c in concepts if isinstance(c, Concept) and c.info.basis is not None]
    pairs = list(combinations(sliced, 2))
    if any(b not in _KNOWN.get(a, ()) for a, b in pairs):
        downs = [down_projections(concept) for concept in sliced]
        found = overlapping_pairs([concept.info for concept in sliced], downs)
        for (i, a), (j, b) in combinations(enumerate(sliced), 2):
            known = _KNOWN.setdefault(a, WeakKeyDictionary())
            known[b] = [found[i, j]] if (i, j) in found else []
    return [collision for a, b in pairs for collision in _KNOWN[a][b]]


def down_projections(concept: Concept, layers: int = _LAYERS) -> dict[str, Tensor]:
    """A concept's down-projections in some layers of each component and width, float32 copies on
    the CPU.

    Args:
        layers: how many of a component and width, spread over the model.
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
class _Pairs:
    """What is counted over layers, for each ordered pair of K concepts.

    Attributes:
        overlap: (K, K), the sum of overlaps over those of random slices.
        layers: (K, K), how many layers both have.
        shared: width -> (sum of ranks, K), whether a concept's row lies in another's slice.
    """

    overlap: Tensor
    layers: Tensor
    shared: dict[int, Tensor] = field(default_factory=dict)


def overlapping_pairs(
    infos: Sequence[SliceOwner], downs: Sequence[DownProjections]
) -> dict[tuple[int, int], Collision]:
    """Every pair whose down-projections share columns, or overlap about as much as random ones.

    Args:
        infos: the facts of each concept; all have slices.
        downs: of each, the same layers as far as it has them.

    Returns:
        (i, j), i below j, the numbers of two concepts -> what they have in common.
    """
    counted = _count(infos, downs)
    starts = torch.tensor([0, *(info.rank for info in infos)]).cumsum(0).tolist()
    found = {}
    for i, j in combinations(range(len(infos)), 2):
        a, b = infos[i], infos[j]
        if not counted.layers[i, j]:
            continue
        columns = {}
        for width, rows in sorted(counted.shared.items()):
            hits = rows[starts[i] : starts[i + 1], j].nonzero().flatten().tolist()
            if hits:
                columns[width] = tuple(sorted(a.slices[str(width)][row] for row in hits))
        if columns:
            found[i, j] = shared_columns_collision(a, b, columns)
        elif (overlap := float(counted.overlap[i, j] / counted.layers[i, j])) > _OVERLAP:
            found[i, j] = unrelated_basis_collision(a, b, overlap)
    return found


def _count(infos: Sequence[SliceOwner], downs: Sequence[DownProjections]) -> _Pairs:
    count, ranks = len(infos), torch.tensor([info.rank for info in infos])
    starts = ranks.cumsum(0) - ranks
    pairs = _Pairs(*torch.zeros(2, count, count, dtype=torch.float32))
    for layer in dict.fromkeys(name for each in downs for name in each):
        owners = [number for number, each in enumerate(downs) if layer in each]
        if len(owners) < 2:
            continue
        width = downs[owners[0]][layer].shape[1]
        # Another model's layer of this name has another width.
        owners = [number for number in owners if downs[number][layer].shape[1] == width]
        shares = row_overlap([downs[number][layer] for number in owners])
        index = torch.tensor(owners)
        own = ranks[index]
        block = torch.repeat_interleave(torch.arange(len(owners)), own)
        energy = torch.zeros_like(shares[: len(owners)]).index_add_(0, block, shares)
        smaller = torch.minimum(own[:, None], own[None, :])
        larger = torch.maximum(own[:, None], own[None, :])
        grid = (index[:, None], index[None, :])
        pairs.overlap[grid] += energy / smaller * width / larger
        pairs.layers[grid] += 1
        rows = torch.cat([starts[number] + torch.arange(int(ranks[number])) for number in owners])
        if width not in pairs.shared:
            pairs.shared[width] = torch.zeros(int(ranks.sum()), count, dtype=torch.bool)
        pairs.shared[width][rows[:, None], index[None, :]] |= shares > _SHARED
    return pairs

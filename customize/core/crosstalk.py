"""Crosstalk: how much one concept's update disturbs another (Orthogonal Adaptation, section 3.3).

Three measures, from the cheapest to the most realistic: the overlap of down-projections, the
overlap of updates (Fig. 9), and the response of updates to layer inputs of other concepts. Disjoint
slices make the first two exactly zero. The third is zero only for inputs that lie outside the other
slice as well, which disjoint slices do not ensure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from customize.core.lowrank import LowRank, check_same_weight, row_factor
from customize.core.precision import full_precision
from customize.errors import ConceptError


@full_precision()
def row_overlap(downs: Sequence[Tensor]) -> Tensor:
    """Return the squared cosine between every row and the row space of every down-projection.

    Args:
        downs: K matrices of shape (r_i, in), any floating dtype, on one device, each with
            orthogonal rows, such as slices.

    Returns:
        (sum of r_i, K), float32, on the CPU, in [0, 1], with rows in the order of ``downs``; 0 for
        a row of zeros. The length of rows has no effect.

    Raises:
        ConceptError: The widths differ.
    """
    if any(down.ndim != 2 or down.shape[1] != downs[0].shape[1] for down in downs):
        shapes = ", ".join(str(tuple(down.shape)) for down in downs[:8])
        raise ConceptError(
            f"down-projections of shapes {shapes} do not read the same input",
            fix="compare (rank, in) down-projections of the same layer",
        )
    rows = torch.nn.functional.normalize(torch.cat([down.detach().float() for down in downs]))
    squares = (rows @ rows.T).square()
    spaces = [block.sum(1) for block in squares.split([len(down) for down in downs], dim=1)]
    return torch.stack(spaces, dim=1).clamp(max=1.0).cpu()


@full_precision()
def update_overlap(p: LowRank, q: LowRank) -> float:
    """``||dW_i dW_j^T||_F / (||dW_i||_F ||dW_j||_F)``, in [0, 1], without dense matrices.

    It is 1 only for two updates of rank one with the same input direction; the overlap of an update
    with itself is between 1 / sqrt(rank) and 1. For an update of zeros it is 0.

    Raises:
        ConceptError: The shapes or devices differ.
    """
    check_same_weight([p, q])
    rows_p, rows_q = row_factor(p), row_factor(q)
    norms = float(torch.linalg.matrix_norm(rows_p) * torch.linalg.matrix_norm(rows_q))
    return float(torch.linalg.matrix_norm(rows_p @ rows_q.T)) / norms if norms > 0 else 0.0


@full_precision()
def response_norms(
    products_by_concept: Mapping[str, Mapping[str, LowRank]],
    inputs_by_concept: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """Return, for each layer, the norm of every update's response to every concept's inputs.

    Args:
        products_by_concept: concept name -> layer name -> update.
        inputs_by_concept: concept name -> layer name -> (n, in): a factor S of the second moment
            ``S^T S``, of trace 1, of the layer's inputs during generation of that concept.

    Returns:
        layer name -> (K, K), float64, on the CPU, in the mapping's order: entry (i, j) is
        ``||dW_j S_i^T||``, the response of update j to the inputs of concept i. Contains the layers
        that all concepts change and have inputs of.

    Raises:
        ConceptError: The shapes of a layer's updates and inputs do not match.
    """
    names = list(products_by_concept)
    first, *others = (set(products_by_concept[name]) for name in names)
    recorded = [set(inputs_by_concept.get(name, {})) for name in names]
    norms = {}
    for layer in products_by_concept[names[0]]:
        if layer not in first.intersection(*others, *recorded):
            continue
        updates = [products_by_concept[name][layer] for name in names]
        inputs = [inputs_by_concept[name][layer].double().cpu() for name in names]
        check_same_weight(updates)
        for rows in inputs:
            _check_inputs(rows, updates[0])
        factors = [row_factor(update).cpu() for update in updates]
        entries = [
            [float(torch.linalg.matrix_norm(factor @ rows.T)) for factor in factors]
            for rows in inputs
        ]
        norms[layer] = torch.tensor(entries, dtype=torch.float64)
    return norms


@full_precision()
def relative_responses(norms_by_layer: Mapping[str, Tensor]) -> Tensor:
    """Divide the response of update j to the inputs of concept i by that of update i, over layers.

    Args:
        norms_by_layer: layer name -> (K, K), from :func:`response_norms`.

    Returns:
        (K, K), float64, with a diagonal of ones: 0 where update j does not respond, 1 where both
        respond equally, infinity where only update j does. (0, 0) without layers.
    """
    if not norms_by_layer:
        return torch.zeros(0, 0, dtype=torch.float64)
    total = torch.stack([entries.square() for entries in norms_by_layer.values()]).sum(0)
    diagonal = total.diagonal()[:, None]
    return torch.where(total > 0, total / diagonal, 0.0).sqrt().fill_diagonal_(1.0)


@full_precision()
def overlap_matrix(products_by_concept: Mapping[str, Mapping[str, LowRank]]) -> Tensor:
    """Return :func:`update_overlap` of every pair of K concepts over all layers.

    Layers are averaged by a root mean square, weighted with the energies of the updates::

        sqrt( sum_l ||dW_i dW_j^T||^2 / sum_l ||dW_i||^2 ||dW_j||^2 )

    so that layers with small updates have little weight. Layers that only one of two concepts
    changes do not count; without a common layer the entry is 0.

    Args:
        products_by_concept: concept name -> layer name -> update.

    Returns:
        (K, K), float64, on the CPU, symmetric, in [0, 1], in the mapping's order.

    Raises:
        ConceptError: Two concepts' updates of a layer differ in shape or device.
    """
    concepts = list(products_by_concept.values())
    count = len(concepts)
    crossed = torch.zeros(count, count, dtype=torch.float64)
    energy = torch.zeros(count, count, dtype=torch.float64)
    for layer in dict.fromkeys(name for concept in concepts for name in concept):
        owners = [k for k, concept in enumerate(concepts) if layer in concept]
        updates = [concepts[k][layer] for k in owners]
        check_same_weight(updates)
        # All pairs in one product: block (i, j) of the Gram matrix has the norm of dW_i dW_j^T.
        factors = [row_factor(update) for update in updates]
        rows = torch.cat(factors)
        block = torch.repeat_interleave(
            torch.tensor(owners), torch.tensor([factor.shape[0] for factor in factors])
        )
        member = torch.nn.functional.one_hot(block, count).to(rows)
        crossed += (member.T @ (rows @ rows.T).square() @ member).cpu()
        energies = (member.T @ rows.square().sum(1)).cpu()
        energy += energies[:, None] * energies[None, :]
    return torch.where(energy > 0, crossed / energy, 0.0).sqrt()


def _check_inputs(inputs: Tensor, p: LowRank) -> None:
    if inputs.ndim != 2 or inputs.shape[1] != p.shape[1]:
        raise ConceptError(
            f"inputs of shape {tuple(inputs.shape)} do not enter a layer of width {p.shape[1]}",
            fix=f"give recorded inputs of shape (n, {p.shape[1]})",
        )

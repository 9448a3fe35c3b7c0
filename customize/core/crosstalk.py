"""How much one concept's update disturbs another (Orthogonal Adaptation, section 3.3, Fig. 9).

Three views, from the cheapest to the truest: of the down-projections' row spaces, of the updates,
and of what the updates do to real layer inputs. Disjoint slices make the first two exactly zero;
the third is zero only if the inputs also avoid the other slice, which nothing ensures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from customize.core.lowrank import LowRank, check_same_weight, row_factor
from customize.core.precision import full_precision
from customize.errors import ConceptError


@full_precision()
def subspace_overlap(down_i: Tensor, down_j: Tensor) -> float:
    """``||B_i^T B_j||_F^2 / r`` for orthonormal bases B of the two row spaces.

    The mean squared cosine of the principal angles: 0 for orthogonal spaces, 1 where the smaller
    space lies in the larger. Two random rank-r spaces of width d give r / d on average.

    Args:
        down_i, down_j: (r_i, in) and (r_j, in), any floating dtype; r is the smaller of the
            numerical ranks, so scales and dependent rows do not count. A zero matrix gives 0.

    Raises:
        ConceptError: the widths differ.
    """
    if down_i.ndim != 2 or down_j.ndim != 2 or down_i.shape[1] != down_j.shape[1]:
        raise ConceptError(
            f"down-projections of shapes {tuple(down_i.shape)} and {tuple(down_j.shape)} "
            "do not read the same input",
            fix="compare (rank, in) down-projections of the same layer",
        )
    basis_i, basis_j = _row_space(down_i), _row_space(down_j)
    smaller = min(basis_i.shape[0], basis_j.shape[0])
    if smaller == 0:
        return 0.0
    return float((basis_i @ basis_j.T).square().sum()) / smaller


@full_precision()
def row_overlap(downs: Sequence[Tensor]) -> Tensor:
    """How much of each row of each down-projection lies in the row space of each other one.

    Unlike :func:`subspace_overlap` for many down-projections at once, by one Gram matrix, and row
    by row; it does not depend on the rows' lengths.

    Args:
        downs: K of shape (r_i, in), any floating dtype, on one device; the rows of each are
            orthogonal to one another, as those of slices are.

    Returns:
        (sum of r_i, K), float32, on the CPU, in [0, 1]: the squared cosine of the angle between
        each row, in the order of ``downs``, and each row space. 0 for a row of zeros.

    Raises:
        ConceptError: the widths differ.
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

    1 only for two updates of rank one that read the same direction; an update against itself
    gives between 1 / sqrt(rank) and 1. A zero update gives 0.

    Raises:
        ConceptError: the shapes or devices differ.
    """
    check_same_weight([p, q])
    rows_p, rows_q = row_factor(p), row_factor(q)
    norms = float(torch.linalg.matrix_norm(rows_p) * torch.linalg.matrix_norm(rows_q))
    return float(torch.linalg.matrix_norm(rows_p @ rows_q.T)) / norms if norms > 0 else 0.0


@full_precision()
def activation_crosstalk(p: LowRank, q: LowRank, inputs: Tensor) -> float:
    """``||dW_j X_i||_F / ||dW_i X_i||_F``: what q does on p's own inputs, against what p does.

    Args:
        p: the update of concept i.
        q: the update of concept j in the same layer.
        inputs: (n, in), any floating dtype: inputs of the layer recorded while concept i is
            drawn, one a row; convolutions as unfolded patches.

    Returns:
        0 where q leaves the inputs alone, 1 where both change them alike, infinity where only q
        does anything.

    Raises:
        ConceptError: the updates or the inputs do not fit together.
    """
    check_same_weight([p, q])
    _check_inputs(inputs, p)
    own, other = (
        float(torch.linalg.matrix_norm(rows @ inputs.to(rows).T))
        for rows in (row_factor(p), row_factor(q))
    )
    if other == 0:
        return 0.0
    return other / own if own > 0 else math.inf


@full_precision()
def response_norms(
    products_by_concept: Mapping[str, Mapping[str, LowRank]],
    inputs_by_concept: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """For each layer, how loudly every update answers to every concept's inputs.

    Args:
        products_by_concept: concept name -> layer name -> update.
        inputs_by_concept: concept name -> layer name -> (n, in), a factor of the second moment of
            the layer's inputs while that concept is drawn, of trace 1.

    Returns:
        layer name -> (K, K), float64, on the CPU, in the mapping's order: entry (i, j) is
        ``||dW_j S_i^T||``, what j's update does on i's inputs. Only layers that all concepts
        change, with inputs of each.

    Raises:
        ConceptError: updates and inputs of a layer do not fit together.
    """
    names = list(products_by_concept)
    first, *others = (set(products_by_concept[name]) for name in names)
    known = [set(inputs_by_concept.get(name, {})) for name in names]
    found = {}
    for layer in products_by_concept[names[0]]:
        if layer not in first.intersection(*others, *known):
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
        found[layer] = torch.tensor(entries, dtype=torch.float64)
    return found


@full_precision()
def relative_responses(answers_by_layer: Mapping[str, Tensor]) -> Tensor:
    """Over all layers: what j's update does on i's inputs, against what i's own does.

    Returns:
        (K, K), with a diagonal of ones: 0 where j leaves i's inputs alone, 1 where both change them
        alike; infinity where only j's does anything. Empty, (0, 0), without layers.
    """
    if not answers_by_layer:
        return torch.zeros(0, 0, dtype=torch.float64)
    total = torch.stack([entries.square() for entries in answers_by_layer.values()]).sum(0)
    own = total.diagonal()[:, None]
    return torch.where(total > 0, total / own, 0.0).sqrt().fill_diagonal_(1.0)


@full_precision()
def overlap_matrix(products_by_concept: Mapping[str, Mapping[str, LowRank]]) -> Tensor:
    """:func:`update_overlap` of every pair of K concepts, over all their layers.

    Layers are aggregated by a root mean square weighted with the updates' energies::

        sqrt( sum_l ||dW_i dW_j^T||^2 / sum_l ||dW_i||^2 ||dW_j||^2 )

    so that layers that hardly changed do not dilute the figure. Layers that only one of the two
    concepts has cannot cross and do not count; without a common layer the entry is 0.

    Args:
        products_by_concept: concept name -> layer name -> update.

    Returns:
        (K, K), float64, on the CPU, symmetric, in [0, 1], in the mapping's order.

    Raises:
        ConceptError: two concepts' updates of one layer differ in shape or device.
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


def _row_space(down: Tensor) -> Tensor:
    """Orthonormal rows that span the rows of ``down``: (numerical rank, in), float64, CPU."""
    exact = down.to(device="cpu", dtype=torch.float64)
    _, s, vh = torch.linalg.svd(exact, full_matrices=False)
    # The tolerance of torch.linalg.matrix_rank, at the precision that the rows were stored in.
    tolerance = s.max() * max(exact.shape) * torch.finfo(down.dtype).eps if s.numel() else 0.0
    return vh[s > tolerance]

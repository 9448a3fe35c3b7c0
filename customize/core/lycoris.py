"""What other adapter methods write into files, as the change of a weight.

A weight is (out, in) or, of a convolution, (out, in, kh, kw); an update of the latter is one of
its flattened form (out, in * kh * kw). Methods that add to a weight give a product of two factors
where that is smaller than the change itself. Methods that turn or rescale a weight need it, and
give the dense change at full strength; those that turn it are in
:mod:`customize.core.oft`.

LoHa and LoKr: arXiv 2309.14859 (LyCORIS) and 2108.06098 (FedPara); DoRA: arXiv 2402.09353.
"""

from __future__ import annotations

import torch
from torch import Tensor

from customize.core.lowrank import LowRank, from_dense, to_dense
from customize.core.precision import full_precision
from customize.errors import ConceptError

_EPSILON = 1e-8  # what LyCORIS and kohya add to a norm that they divide by


@full_precision()
def tucker_product(up: Tensor, down: Tensor, core: Tensor | None) -> LowRank:
    """``up @ down``, or with a convolution's core between them (CP and Tucker forms).

    Args:
        up: (out, r), or (out, r, 1, 1).
        down: (s, in), or (s, in, 1, 1); without a core (r, in), or (r, in, kh, kw).
        core: (r, s, kh, kw), the small convolution between the two, or None.

    Raises:
        ConceptError: the shapes do not fit together.
    """
    if any(side != 1 for side in up.shape[2:]):
        raise ConceptError(f"the up-projection of shape {tuple(up.shape)} is wider than one pixel")
    if core is None:
        return LowRank(up.flatten(1), down.flatten(1))
    flat = down.flatten(1)
    if core.ndim < 3 or core.shape[1] != flat.shape[0]:
        raise ConceptError(
            f"a core of shape {tuple(core.shape)} and a down-projection of shape "
            f"{tuple(down.shape)} have no product"
        )
    wide = torch.einsum("rs...,si->ri...", *_to_common_dtype(core, flat))
    return LowRank(up.flatten(1), wide.flatten(1))


@full_precision()
def hadamard_product(p: LowRank, q: LowRank) -> LowRank:
    """The elementwise product (LoHa), exact: rank ``p.rank * q.rank``, or dense where that is less.

    Raises:
        ConceptError: the shapes differ.
    """
    if p.shape != q.shape:
        raise ConceptError(f"updates of shapes {p.shape} and {q.shape} have no elementwise product")
    rank, (out, width) = p.rank * q.rank, p.shape
    if rank >= min(out, width):
        return from_dense(to_dense(p) * to_dense(q))
    # Row o of `up` is the Kronecker product of the rows o, and so with the columns of `down`.
    up = torch.einsum("or,os->ors", *_to_common_dtype(p.up, q.up)).flatten(1)
    down = torch.einsum("ri,si->rsi", *_to_common_dtype(p.down, q.down)).flatten(0, 1)
    return LowRank(up, down, p.scale * q.scale)


@full_precision()
def kronecker_product(p: LowRank, q: LowRank) -> LowRank:
    """The Kronecker product (LoKr), exact: rank ``p.rank * q.rank``, or dense where that is less.

    Of shape (p.out * q.out, p.in * q.in); of a convolution, q's width counts its kernel.
    """
    out, width = p.shape[0] * q.shape[0], p.shape[1] * q.shape[1]
    if p.rank * q.rank >= min(out, width):
        return from_dense(_kronecker(to_dense(p), to_dense(q)))
    return LowRank(_kronecker(p.up, q.up), _kronecker(p.down, q.down), p.scale * q.scale)


@full_precision()
def dora_delta(weight: Tensor, update: LowRank, magnitude: Tensor) -> Tensor:
    """What DoRA adds: ``m * V / |V| - W`` with ``V = W + update``.

    Args:
        magnitude: (out,) or (out, 1, ...) for norms of V's rows; or (1, in, ...), for norms over
            all but the input channels.

    Returns:
        weight's shape, float32.

    Raises:
        ConceptError: the magnitude fits neither, or the update another weight.
    """
    base = weight.float()
    if update.shape != (base.shape[0], base[0].numel()):
        raise ConceptError(f"an update of shape {update.shape} is not one of {tuple(base.shape)}")
    changed = base + to_dense(update).float().reshape(base.shape)
    sides = [magnitude.shape[0], *[1] * (base.ndim - 1)] if magnitude.ndim == 1 else magnitude.shape
    kept = [dim for dim, side in enumerate(sides) if side != 1]
    if len(sides) != base.ndim or kept not in ([0], [1]) or sides[kept[0]] != base.shape[kept[0]]:
        raise ConceptError(
            f"magnitudes of shape {tuple(magnitude.shape)} do not fit a weight of shape "
            f"{tuple(base.shape)}"
        )
    others = [dim for dim in range(base.ndim) if dim not in kept]
    lengths = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
    return magnitude.float().reshape(sides) / lengths.clamp_min(_EPSILON) * changed - base


@full_precision()
def initial_adapter(weight: Tensor, rank: int, scale: float, start: str) -> LowRank:
    """What peft takes out of a weight when it begins an adapter with a part of it.

    Args:
        weight: (out, in).
        scale: that of the adapter, alpha / rank or the like.
        start: "pissa" (arXiv 2404.02948): the ``rank`` largest singular components. "olora" (arXiv
            2406.01775): ``scale`` times the first ``rank`` columns and rows of a QR decomposition.
            Neither depends on the signs that the decompositions leave open.

    Returns:
        Factors in float64, whose product has the weight's shape.
    """
    base = weight.float()  # as peft decomposes it
    if start == "olora":
        q, r = torch.linalg.qr(base)
        return LowRank(q[:, :rank].double(), r[:rank].double(), scale)
    if start != "pissa":
        raise ValueError(start)
    u, values, vh = (part.double() for part in torch.linalg.svd(base, full_matrices=False))
    return LowRank(u[:, :rank] * values[:rank], vh[:rank])


def _kronecker(a: Tensor, b: Tensor) -> Tensor:
    """The Kronecker product of two matrices, whatever their strides: ``torch.kron`` fails on those
    that sides of 1 may have."""
    (m, n), (k, w) = a.shape, b.shape
    return torch.einsum("mn,kw->mknw", *_to_common_dtype(a, b)).reshape(m * k, n * w)


def _to_common_dtype(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 or a higher precision that one of them has."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype), b.to(dtype)

"""Updates of the adapter methods LoHa, LoKr, DoRA, PiSSA and OLoRA, decoded from their parameters.

A weight has the shape (out, in), or (out, in, kh, kw) for a convolution, whose update has the
flattened shape (out, in * kh * kw). Additive methods give a low-rank product where it is smaller
than the dense update. DoRA rescales the weight, so it needs the weight and gives a dense update;
for methods that rotate weights see :mod:`customize.core.oft`.

LoHa and LoKr: arXiv 2309.14859 (LyCORIS) and 2108.06098 (FedPara); DoRA: arXiv 2402.09353.
"""

from __future__ import annotations

import torch
from torch import Tensor

from customize.core.lowrank import LowRank, from_dense, to_dense
from customize.core.precision import full_precision
from customize.errors import ConceptError

# The minimum of norms in denominators, as in LyCORIS and kohya.
_EPSILON = 1e-8


@full_precision()
def tucker_product(up: Tensor, down: Tensor, core: Tensor | None) -> LowRank:
    """Return ``up @ down``, or ``up @ core @ down`` of a convolution in CP or Tucker form.

    Args:
        up: (out, r), or (out, r, 1, 1).
        down: (s, in), or (s, in, 1, 1); without a core (r, in), or (r, in, kh, kw).
        core: (r, s, kh, kw), the convolution between the two, or None.

    Raises:
        ConceptError: The shapes do not match.
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
    """Return the elementwise product (LoHa), exactly.

    Returns:
        An update of rank ``p.rank * q.rank``; a dense one where that is not below min(out, in).

    Raises:
        ConceptError: The shapes differ.
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
    """Return the Kronecker product (LoKr), exactly.

    Returns:
        An update of shape (p.out * q.out, p.in * q.in) and rank ``p.rank * q.rank``; a dense one
        where that rank is not below the smaller side. For a convolution q's width includes the
        kernel.
    """
    out, width = p.shape[0] * q.shape[0], p.shape[1] * q.shape[1]
    if p.rank * q.rank >= min(out, width):
        return from_dense(_kronecker(to_dense(p), to_dense(q)))
    return LowRank(_kronecker(p.up, q.up), _kronecker(p.down, q.down), p.scale * q.scale)


@full_precision()
def dora_delta(weight: Tensor, update: LowRank, magnitude: Tensor) -> Tensor:
    """Return the change of a weight W by DoRA: ``m * V / ||V|| - W`` with ``V = W + update``.

    Args:
        weight: (out, in), or (out, in, kh, kw), any floating dtype.
        update: Its low-rank update.
        magnitude: (out,) or (out, 1, ...) for norms over V's rows, or (1, in, ...) for norms over
            all dimensions except the input channels.

    Returns:
        The weight's shape, float32.

    Raises:
        ConceptError: The shape of the magnitude or the update does not match the weight.
    """
    base = weight.float()
    if update.shape != (base.shape[0], base[0].numel()):
        raise ConceptError(f"an update of shape {update.shape} is not one of {tuple(base.shape)}")
    changed = base + to_dense(update).float().reshape(base.shape)
    sides = [magnitude.shape[0], *[1] * (base.ndim - 1)] if magnitude.ndim == 1 else magnitude.shape
    axes = [dim for dim, side in enumerate(sides) if side != 1] or [0]  # of one row
    if len(sides) != base.ndim or axes not in ([0], [1]) or sides[axes[0]] != base.shape[axes[0]]:
        raise ConceptError(
            f"magnitudes of shape {tuple(magnitude.shape)} do not fit a weight of shape "
            f"{tuple(base.shape)}"
        )
    others = [dim for dim in range(base.ndim) if dim not in axes]
    lengths = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
    return magnitude.float().reshape(sides) / lengths.clamp_min(_EPSILON) * changed - base


@full_precision()
def initial_adapter(weight: Tensor, rank: int, scale: float, start: str) -> LowRank:
    """Return the part of a weight that peft moves into an adapter at its initialization.

    Args:
        weight: (out, in).
        rank: The adapter's rank.
        scale: The adapter's scale, such as alpha / rank.
        start: "pissa" (arXiv 2404.02948): the ``rank`` largest singular components. "olora" (arXiv
            2406.01775): ``scale`` times the first ``rank`` columns and rows of a QR decomposition.
            The product does not depend on the signs of the decompositions.

    Returns:
        An update of the weight's shape with factors in float64.

    Raises:
        ValueError: The start is another one.
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
    """Return the Kronecker product; ``torch.kron`` fails on some strides of sides of length 1."""
    (m, n), (k, w) = a.shape, b.shape
    return torch.einsum("mn,kw->mknw", *_to_common_dtype(a, b)).reshape(m * k, n * w)


def _to_common_dtype(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Convert both to float32, or to a higher precision of one of them."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype), b.to(dtype)

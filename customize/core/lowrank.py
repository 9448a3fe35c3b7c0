"""Weight updates as low-rank products ``scale * up @ down``, and exact sums of them.

Everything here acts on the *product*, never on the factors by themselves: summing ups and downs
apart brings in the cross terms ``up_i @ down_j``. Nothing is made dense but by :func:`to_dense`
and what says so. Other ways to merge than the sum are in :mod:`customize.core.merges`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from customize.core.precision import full_precision
from customize.errors import ConceptError, ConfigError

# Ranks that `add_to` multiplies at once.
_BATCH_RANK = 256


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update ``scale * up @ down`` of one (out, in) weight.

    Attributes:
        up: (out, r), any floating dtype.
        down: (r, in), any floating dtype, on the device of ``up``.
        scale: alpha / r, or whatever the adapter multiplies its product with; finite.

    Raises:
        ConceptError: the factors do not fit together, or the scale is not finite.
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        up, down = tuple(self.up.shape), tuple(self.down.shape)
        if len(up) != 2 or len(down) != 2 or up[1] != down[0]:
            raise ConceptError(
                f"an up-projection of shape {up} and a down-projection of shape {down} "
                "have no product",
                fix="give shapes (out, rank) and (rank, in); convolutions go through from_factors",
            )
        if not math.isfinite(self.scale):
            raise ConceptError(f"the scale of an update is {self.scale}", fix="give a finite scale")

    def __repr__(self) -> str:
        out, width = self.shape
        return f"LowRank({out}x{width}, rank {self.rank}, scale {self.scale:g}, {self.up.dtype})"

    @property
    def rank(self) -> int:
        """Columns of ``up``: an upper bound of the product's rank."""
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the product."""
        return self.up.shape[0], self.down.shape[1]


def from_factors(up: Tensor, down: Tensor, scale: float = 1.0) -> LowRank:
    """A LowRank from the factors of a linear or a convolution layer.

    Args:
        up: (out, r), or (out, r, 1, 1) of a 1 x 1 convolution (any number of 1s).
        down: (r, in), or (r, in, kh, kw): flattened to (r, in * kh * kw), so the product
            reshaped to (out, in, kh, kw) is the update of the convolution's weight.
        scale: as in :class:`LowRank`.

    Raises:
        ConceptError: the shapes do not fit together, or ``up`` is wider than one pixel.
    """
    if any(side != 1 for side in up.shape[2:]):
        raise ConceptError(
            f"the up-projection of shape {tuple(up.shape)} is not a 1 x 1 convolution",
            fix="give an up-projection whose kernel is one pixel",
        )
    return LowRank(up.flatten(1), down.flatten(1), scale)


@full_precision()
def from_dense(update: Tensor) -> LowRank:
    """Any update as a product, exact: the smaller of the two sides becomes an identity.

    Args:
        update: (out, in), or of a convolution (out, in, kh, kw), which is flattened.

    Returns:
        rank min(out, in * kh * kw), in update's dtype.

    Raises:
        ConceptError: it has fewer than two dimensions.
    """
    if update.ndim < 2:
        raise ConceptError(f"an update of shape {tuple(update.shape)} is not that of a weight")
    flat = update.flatten(1)
    eye = torch.eye(min(flat.shape), dtype=flat.dtype, device=flat.device)
    return LowRank(eye, flat) if flat.shape[0] < flat.shape[1] else LowRank(flat, eye)


def slice_rows(p: LowRank, start: int, stop: int) -> LowRank:
    """The update of rows ``start:stop`` of the weight alone."""
    return LowRank(p.up[start:stop], p.down, p.scale)


def pad_rank(p: LowRank, rank: int) -> LowRank:
    """The same with the scale in the up-projection, and zeros in both factors up to a rank."""
    missing = rank - p.rank
    up = torch.nn.functional.pad(p.up * p.scale, (0, missing))
    down = torch.nn.functional.pad(p.down, (0, 0, 0, missing))
    return LowRank(up.contiguous(), down.contiguous())


@full_precision()
def stack_rows(products: Sequence[LowRank]) -> LowRank:
    """The update of several weights laid one below the other, exact.

    Ranks add up; where all have bit-equal down-projections, as concepts of the method
    "orthogonal" have, the rank stays.

    Args:
        products: at least one, of equal input width and on one device.

    Returns:
        Scale 1; float32 or the factors' higher precision.

    Raises:
        ConceptError: no products, or their widths differ.
    """
    if len({p.shape[1] for p in products}) != 1:
        raise ConceptError("updates of different input widths cannot be laid below one another")
    dtype = common_dtype(products)
    downs = [p.down.to(dtype) for p in products]
    ups = [p.scale * p.up.to(dtype) for p in products]
    if all(torch.equal(down, downs[0]) for down in downs[1:]):
        return LowRank(torch.cat(ups), downs[0])
    return LowRank(torch.block_diag(*ups), torch.cat(downs))


@full_precision()
def to_dense(p: LowRank) -> Tensor:
    """The dense update: (out, in), float32 or the factors' higher precision."""
    dtype = common_dtype([p])
    dense = _dense_factor(p)
    if dense is not None:
        return p.scale * dense.to(dtype)
    return p.scale * (p.up.to(dtype) @ p.down.to(dtype))


@full_precision()
def weighted_sum(products: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """``sum_i weights[i] * products[i]``, exact, by laying the factors side by side.

    Weights and scales go into the up-projection and the result's scale is 1. Ranks add up; of
    products with bit-equal down-projections, such as concepts on one slice, the ups are added and
    the rank stays, and of products that all have one up-projection the downs. Where the rank would
    pass the smaller side of the weight, the sum is dense (:func:`from_dense`).

    Args:
        products: at least one, of equal shape and on one device.
        weights: as many, finite; they need not add to 1 (the paper sums with 0.6 each).

    Returns:
        float32 or the factors' higher precision.

    Raises:
        ConceptError: no products, or their shapes or devices differ.
        ConfigError: another number of weights than of products, or one is not finite.
    """
    check_mergeable(products, weights)
    dtype = common_dtype(products)
    same = products[0].up
    if len(products) > 1 and all(torch.equal(p.up, same) for p in products[1:]):
        # Such as identities, of dense updates.
        down = torch.zeros_like(products[0].down, dtype=dtype)
        for p, weight in zip(products, weights, strict=True):
            down.add_(p.down, alpha=weight * p.scale)
        return LowRank(same.to(dtype), down)
    groups = _group_by_down(products)
    if sum(products[own[0]].rank for own in groups) <= min(products[0].shape):
        return LowRank(*_concatenate_factors(products, weights, groups, same.device, dtype))
    total = torch.zeros(products[0].shape, dtype=dtype, device=same.device)
    add_weighted_sum(total, products, weights)
    return from_dense(total)


def add_weighted_sum(total: Tensor, products: Sequence[LowRank], weights: Sequence[float]) -> None:
    """``total += sum_i weights[i] * products[i]``, in place and in total's precision.

    Beside ``total`` it needs no dense matrix. The work grows with the sum of the ranks, but of
    products with bit-equal down-projections only by the addition of their ups.

    Args:
        total: (out, in), float32 or wider, on any device.
        products: of its shape, on any one device; none is nothing to add.
        weights: as many, finite.
    """
    with ExitStack() as stack:
        stack.enter_context(full_precision())
        if total.is_inference():  # which nobody could change elsewhere
            stack.enter_context(torch.inference_mode())
        _add_weighted_sum(total, products, weights)


def _add_weighted_sum(total: Tensor, products: Sequence[LowRank], weights: Sequence[float]) -> None:
    low = []
    for k, (p, weight) in enumerate(zip(products, weights, strict=True)):
        dense = _dense_factor(p)
        if dense is None:
            low.append(k)
        else:
            total.add_(dense.to(total.device), alpha=weight * p.scale)
    groups = [[low[k] for k in own] for own in _group_by_down([products[k] for k in low])]
    while groups:
        some: list[list[int]] = []
        # Wide enough to be fast, and small beside the layer.
        while groups and sum(products[own[0]].rank for own in some) < _BATCH_RANK:
            some.append(groups.pop(0))
        total.addmm_(*_concatenate_factors(products, weights, some, total.device, total.dtype))


def _group_by_down(products: Sequence[LowRank]) -> list[list[int]]:
    """The numbers of products by bit-equal down-projections, in the order of the first of each."""
    groups: list[list[int]] = []
    alike: dict[tuple[float, ...], list[list[int]]] = {}
    for k, p in enumerate(products):
        # Equal values in another precision are the same slice; few numbers tell most apart.
        key = (p.rank, *p.down[:1, :4].flatten().tolist())
        for own in alike.setdefault(key, []):
            first = products[own[0]].down
            dtype = torch.promote_types(first.dtype, p.down.dtype)
            if torch.equal(first.to(dtype), p.down.to(dtype)):
                own.append(k)
                break
        else:
            alike[key].append([k])
            groups.append(alike[key][-1])
    return groups


def _concatenate_factors(
    products: Sequence[LowRank],
    weights: Sequence[float],
    groups: Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Up and down of a weighted sum: for each group its ups added, and its one down."""
    ups, columns = [], []
    for own in groups:
        first = products[own[0]]
        factors = [weights[k] * products[k].scale for k in own]
        up = first.up
        if len(own) > 1:
            up = up.to(dtype) * factors[0]
            for k, factor in zip(own[1:], factors[1:], strict=True):
                up.add_(products[k].up, alpha=factor)
        ups.append(up)
        columns += [factors[0] if len(own) == 1 else 1.0] * first.rank
    up = torch.cat(ups, dim=1).to(device, dtype)
    down = torch.cat([products[own[0]].down for own in groups]).to(device, dtype)
    return up * torch.tensor(columns, dtype=dtype, device=device), down


def _dense_factor(p: LowRank) -> Tensor | None:
    """The matrix of an update that :func:`from_dense` made, without its scale."""
    if p.rank != min(p.shape):
        return None
    if p.rank == p.shape[0] and _is_identity(p.up):
        return p.down
    return p.up if p.rank == p.shape[1] and _is_identity(p.down) else None


def _is_identity(factor: Tensor) -> bool:
    ones = bool((factor.diagonal() == 1).all())
    return ones and int(factor.count_nonzero()) == len(factor)


def all_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite, in one pass without a copy."""
    # A sum is finite only if all its terms are; it may be too large though they are.
    return math.isfinite(float(values.sum())) or bool(values.isfinite().all())


@full_precision()
def inner_product(p: LowRank, q: LowRank) -> float:
    """The Frobenius inner product ``<p, q> = tr(p^T q)``, in float64, from r x r Gram matrices.

    Raises:
        ConceptError: the shapes or devices differ.
    """
    check_same_weight([p, q])
    ups = to_float64(p.up).T @ to_float64(q.up)
    downs = to_float64(p.down) @ to_float64(q.down).T
    return p.scale * q.scale * float((ups * downs).sum())


@full_precision()
def row_factor(p: LowRank) -> Tensor:
    """A thin F with ``F^T F == dW^T dW``: the product without its orthonormal column factor.

    ``dW = Q @ F`` with orthonormal Q, so norms of ``dW``, of ``dW @ X`` and of ``dW_i dW_j^T``
    are those of F, at a rank's size in place of the layer's.

    Returns:
        (min(out, rank), in), float64.
    """
    up = to_float64(p.up)
    factor = up if p.rank >= p.shape[0] else torch.linalg.qr(up).R
    return p.scale * (factor @ to_float64(p.down))


@full_precision()
def norm(p: LowRank) -> float:
    """The Frobenius norm of the product, in float64.

    Not ``sqrt(inner(p, p))``: squares lose half of the digits where the terms of a sum cancel,
    and :func:`distance` is such a sum.
    """
    return float(torch.linalg.matrix_norm(row_factor(p)))


@full_precision()
def distance(p: LowRank, q: LowRank) -> float:
    """The Frobenius norm of ``p - q``, in float64.

    Raises:
        ConceptError: the shapes or devices differ.
    """
    wide = [LowRank(to_float64(each.up), to_float64(each.down), each.scale) for each in (p, q)]
    return norm(weighted_sum(wide, [1.0, -1.0]))


def check_same_weight(products: Sequence[LowRank]) -> None:
    """Refuse products that are not updates of one weight.

    Raises:
        ConceptError: the shapes or devices differ.
    """
    for p in products[1:]:
        if p.shape != products[0].shape or p.up.device != products[0].up.device:
            raise ConceptError(
                f"updates of shapes {products[0].shape} on {products[0].up.device} and {p.shape} "
                f"on {p.up.device} do not belong to one weight",
                fix="combine updates of the same layer of the same base model, on one device",
            )


def check_mergeable(products: Sequence[LowRank], weights: Sequence[float]) -> None:
    if not products:
        raise ConceptError("there is nothing to merge", fix="give at least one update")
    if len(weights) != len(products):
        raise ConfigError(
            f"{len(weights)} weights were given for {len(products)} updates",
            fix="give one weight for each",
        )
    for weight in weights:
        if not math.isfinite(weight):
            raise ConfigError(f"a merge weight is {weight}", fix="give finite weights")
    check_same_weight(products)


def common_dtype(products: Sequence[LowRank]) -> torch.dtype:
    dtypes = [factor.dtype for p in products for factor in (p.up, p.down)]
    return reduce(torch.promote_types, dtypes, torch.float32)


def to_float64(factor: Tensor) -> Tensor:
    """The factor in float64, on its device or the CPU."""
    # Apple's GPUs have no float64; the factors are small enough to bring over.
    device = torch.device("cpu") if factor.device.type == "mps" else factor.device
    return factor.to(device=device, dtype=torch.float64)

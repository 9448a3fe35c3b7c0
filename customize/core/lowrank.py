"""Weight updates as low-rank products ``scale * up @ down``, and exact sums of them.

All operations act on the *product*: summing ups and downs separately would add the cross terms
``up_i @ down_j``. No function makes an update dense except :func:`to_dense` and those that
document it. Other merges than the sum are in :mod:`customize.core.merges`.
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
from customize.text import plural

# Sum of ranks that `add_weighted_sum` multiplies at once: fast, and small beside a layer.
_BATCH_RANK = 256


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update ``scale * up @ down`` of one (out, in) weight.

    Attributes:
        up: (out, r), any floating dtype.
        down: (r, in), any floating dtype, on the device of ``up``.
        scale: The factor of the product, such as alpha / r; finite.

    Raises:
        ConceptError: The shapes do not match, or the scale is not finite.
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
        """The number of columns of ``up``: an upper bound of the product's rank."""
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """The product's shape, (out, in)."""
        return self.up.shape[0], self.down.shape[1]


def from_factors(up: Tensor, down: Tensor, scale: float = 1.0) -> LowRank:
    """Create an update from the factors of a linear layer or a convolution.

    Args:
        up: (out, r), or (out, r, 1, 1) of a 1 x 1 convolution (any number of 1s).
        down: (r, in), or (r, in, kh, kw): flattened to (r, in * kh * kw), so the product
            reshaped to (out, in, kh, kw) is the update of the convolution's weight.
        scale: The factor of the product.

    Raises:
        ConceptError: The shapes do not match, or ``up`` has a kernel of more than one pixel.
    """
    if any(side != 1 for side in up.shape[2:]):
        raise ConceptError(
            f"the up-projection of shape {tuple(up.shape)} is not a 1 x 1 convolution",
            fix="give an up-projection whose kernel is one pixel",
        )
    return LowRank(up.flatten(1), down.flatten(1), scale)


@full_precision()
def from_dense(update: Tensor) -> LowRank:
    """Represent a dense update as a product, exactly: one factor is an identity matrix.

    Args:
        update: (out, in), or (out, in, kh, kw) of a convolution, which is flattened.

    Returns:
        An update of rank min(out, in * kh * kw), in the same dtype.

    Raises:
        ConceptError: The update has fewer than two dimensions.
    """
    if update.ndim < 2:
        raise ConceptError(f"an update of shape {tuple(update.shape)} is not that of a weight")
    flat = update.flatten(1)
    eye = torch.eye(min(flat.shape), dtype=flat.dtype, device=flat.device)
    return LowRank(eye, flat) if flat.shape[0] < flat.shape[1] else LowRank(flat, eye)


def slice_rows(p: LowRank, start: int, stop: int) -> LowRank:
    """Return the update of the weight's rows ``start:stop``."""
    return LowRank(p.up[start:stop], p.down, p.scale)


def pad_rank(p: LowRank, rank: int) -> LowRank:
    """Pad both factors with zeros up to a rank, and multiply the scale into the up-projection."""
    missing = rank - p.rank
    up = torch.nn.functional.pad(p.up * p.scale, (0, missing))
    down = torch.nn.functional.pad(p.down, (0, 0, 0, missing))
    return LowRank(up.contiguous(), down.contiguous())


@full_precision()
def stack_rows(products: Sequence[LowRank]) -> LowRank:
    """Return the update of several weights that are concatenated along their rows, exactly.

    The ranks add up, unless all down-projections are bit-equal, such as slices of one concept.

    Args:
        products: At least one, of equal input width and on one device.

    Returns:
        An update of scale 1, in float32 or the factors' higher precision.

    Raises:
        ConceptError: There are no products, or their widths differ.
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
    """Return the dense update: (out, in), float32 or the factors' higher precision."""
    dtype = common_dtype([p])
    dense = _dense_factor(p)
    if dense is not None:
        return p.scale * dense.to(dtype)
    return p.scale * (p.up.to(dtype) @ p.down.to(dtype))


@full_precision()
def weighted_sum(products: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Return ``sum_i weights[i] * products[i]``, exactly, by concatenating the factors.

    Weights and scales are multiplied into the up-projection. The ranks add up, except for products
    with bit-equal down-projections, such as concepts of one slice, whose ups are added, and for
    products that all have the same up-projection, whose downs are added. Where the rank would
    exceed the smaller side of the weight, the sum is dense (:func:`from_dense`).

    Args:
        products: At least one, of equal shape and on one device.
        weights: One finite weight for each product; they need not add up to 1 (Orthogonal
            Adaptation uses 0.6 each).

    Returns:
        An update of scale 1, in float32 or the factors' higher precision.

    Raises:
        ConceptError: There are no products, or their shapes or devices differ.
        ConfigError: The number of weights differs, or one is not finite.
    """
    check_mergeable(products, weights)
    dtype = common_dtype(products)
    up = products[0].up
    if len(products) > 1 and all(torch.equal(p.up, up) for p in products[1:]):
        # Such as the identity matrices of dense updates.
        down = torch.zeros_like(products[0].down, dtype=dtype)
        for p, weight in zip(products, weights, strict=True):
            down.add_(p.down, alpha=weight * p.scale)
        return LowRank(up.to(dtype), down)
    groups = _group_by_down(products)
    if sum(products[group[0]].rank for group in groups) <= min(products[0].shape):
        return LowRank(*_concatenate_factors(products, weights, groups, up.device, dtype))
    total = torch.zeros(products[0].shape, dtype=dtype, device=up.device)
    add_weighted_sum(total, products, weights)
    return from_dense(total)


def add_weighted_sum(total: Tensor, products: Sequence[LowRank], weights: Sequence[float]) -> None:
    """Compute ``total += sum_i weights[i] * products[i]`` in place and in total's precision.

    No other dense matrix is made. The cost grows with the sum of the ranks, where products with
    bit-equal down-projections count once.

    Args:
        total: (out, in), float32 or float64, on any device.
        products: Updates of total's shape, on any one device; may be empty.
        weights: One finite weight for each product.
    """
    with ExitStack() as stack:
        stack.enter_context(full_precision())
        if total.is_inference():  # can only be modified in inference mode
            stack.enter_context(torch.inference_mode())
        _add_weighted_sum(total, products, weights)


def _add_weighted_sum(total: Tensor, products: Sequence[LowRank], weights: Sequence[float]) -> None:
    low_rank = []
    for k, (p, weight) in enumerate(zip(products, weights, strict=True)):
        dense = _dense_factor(p)
        if dense is None:
            low_rank.append(k)
        else:
            total.add_(dense.to(total.device), alpha=weight * p.scale)
    by_down = _group_by_down([products[k] for k in low_rank])
    groups = [[low_rank[k] for k in group] for group in by_down]
    while groups:
        batch: list[list[int]] = []
        while groups and sum(products[group[0]].rank for group in batch) < _BATCH_RANK:
            batch.append(groups.pop(0))
        total.addmm_(*_concatenate_factors(products, weights, batch, total.device, total.dtype))


def _group_by_down(products: Sequence[LowRank]) -> list[list[int]]:
    """Group indices of products by equal down-projections, in the order of first occurrence."""
    groups: list[list[int]] = []
    candidates: dict[tuple[float, ...], list[list[int]]] = {}
    for k, p in enumerate(products):
        # The rank and four entries distinguish most slices; only candidates are compared in full.
        key = (p.rank, *p.down[:1, :4].flatten().tolist())
        for group in candidates.setdefault(key, []):
            first = products[group[0]].down
            # Equal values in another precision are the same slice.
            dtype = torch.promote_types(first.dtype, p.down.dtype)
            if torch.equal(first.to(dtype), p.down.to(dtype)):
                group.append(k)
                break
        else:
            candidates[key].append([k])
            groups.append(candidates[key][-1])
    return groups


def _concatenate_factors(
    products: Sequence[LowRank],
    weights: Sequence[float],
    groups: Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return up and down of a weighted sum: of each group the sum of its ups, and its down."""
    ups, columns = [], []
    for group in groups:
        first = products[group[0]]
        factors = [weights[k] * products[k].scale for k in group]
        up = first.up
        if len(group) > 1:
            up = up.to(dtype) * factors[0]
            for k, factor in zip(group[1:], factors[1:], strict=True):
                up.add_(products[k].up, alpha=factor)
        ups.append(up)
        columns += [factors[0] if len(group) == 1 else 1.0] * first.rank
    up = torch.cat(ups, dim=1).to(device, dtype)
    down = torch.cat([products[group[0]].down for group in groups]).to(device, dtype)
    return up * torch.tensor(columns, dtype=dtype, device=device), down


def _dense_factor(p: LowRank) -> Tensor | None:
    """Return the dense factor of an update from :func:`from_dense`, without its scale."""
    if p.rank == p.shape[0] and _is_identity(p.up):
        return p.down
    return p.up if p.rank == p.shape[1] and _is_identity(p.down) else None


def _is_identity(factor: Tensor) -> bool:
    ones = bool((factor.diagonal() == 1).all())
    return ones and int(factor.count_nonzero()) == len(factor)


def all_finite(values: Tensor) -> bool:
    """Whether no entry is NaN or infinite; usually in one pass without a copy."""
    # A finite sum has finite terms only. The sum of finite terms may overflow, so check them then.
    return math.isfinite(float(values.sum())) or bool(values.isfinite().all())


@full_precision()
def inner_product(p: LowRank, q: LowRank) -> float:
    """Return the Frobenius inner product ``tr(p^T q)`` in float64, from r x r Gram matrices.

    Raises:
        ConceptError: The shapes or devices differ.
    """
    check_same_weight([p, q])
    ups = to_float64(p.up).T @ to_float64(q.up)
    downs = to_float64(p.down) @ to_float64(q.down).T
    return p.scale * q.scale * float((ups * downs).sum())


@full_precision()
def row_factor(p: LowRank) -> Tensor:
    """Return a thin F with ``F^T F == dW^T dW``.

    ``dW = Q @ F`` with orthonormal columns of Q, so the norms of ``dW``, ``dW @ X`` and
    ``dW_i dW_j^T`` equal those of F, which is as small as the rank.

    Returns:
        (min(out, rank), in), float64.
    """
    up = to_float64(p.up)
    factor = up if p.rank >= p.shape[0] else torch.linalg.qr(up).R
    return p.scale * (factor @ to_float64(p.down))


@full_precision()
def norm(p: LowRank) -> float:
    """Return the Frobenius norm of the product in float64.

    Not ``sqrt(inner_product(p, p))``: where the terms of a sum cancel, as in :func:`distance`,
    squares lose half of the digits.
    """
    return float(torch.linalg.matrix_norm(row_factor(p)))


@full_precision()
def distance(p: LowRank, q: LowRank) -> float:
    """Return the Frobenius norm of ``p - q`` in float64.

    Raises:
        ConceptError: The shapes or devices differ.
    """
    exact = [LowRank(to_float64(x.up), to_float64(x.down), x.scale) for x in (p, q)]
    return norm(weighted_sum(exact, [1.0, -1.0]))


def check_same_weight(products: Sequence[LowRank]) -> None:
    """Refuse products that are not updates of one weight.

    Raises:
        ConceptError: The shapes or devices differ.
    """
    for p in products[1:]:
        if p.shape != products[0].shape or p.up.device != products[0].up.device:
            raise ConceptError(
                f"updates of shapes {products[0].shape} on {products[0].up.device} and {p.shape} "
                f"on {p.up.device} do not belong to one weight",
                fix="combine updates of the same layer of the same base model, on one device",
            )


def check_mergeable(products: Sequence[LowRank], weights: Sequence[float]) -> None:
    """Refuse products and weights that cannot be merged.

    Raises:
        ConceptError: There are no products, or their shapes or devices differ.
        ConfigError: The number of weights differs, or one is not finite.
    """
    if not products:
        raise ConceptError("there is nothing to merge", fix="give at least one update")
    if len(weights) != len(products):
        raise ConfigError(
            f"{plural(len(weights), 'weight')} for {plural(len(products), 'update')}",
            fix="give one weight for each",
        )
    for weight in weights:
        if not math.isfinite(weight):
            raise ConfigError(f"a merge weight is {weight}", fix="give finite weights")
    check_same_weight(products)


def common_dtype(products: Sequence[LowRank]) -> torch.dtype:
    """Return float32, or the highest precision of the factors above it."""
    dtypes = [factor.dtype for p in products for factor in (p.up, p.down)]
    return reduce(torch.promote_types, dtypes, torch.float32)


def to_float64(factor: Tensor) -> Tensor:
    """Convert a factor to float64, on its device or on the CPU."""
    # Apple's GPUs have no float64; the factors are small enough to copy.
    device = torch.device("cpu") if factor.device.type == "mps" else factor.device
    return factor.to(device=device, dtype=torch.float64)

"""Truncation of updates to a lower rank."""

from __future__ import annotations

import torch
from torch import Tensor

from customize.core.lowrank import LowRank, common_dtype, to_dense, to_float64
from customize.core.precision import full_precision
from customize.core.scalars import is_integer
from customize.errors import ConfigError
from customize.text import quote

# Of the subspace iteration in `truncate_randomized`.
_OVERSAMPLING, _ITERATIONS = 10, 4


@full_precision()
def truncate(p: LowRank, rank: int) -> LowRank:
    """Return the best approximation of at most a rank in the Frobenius norm (Eckart-Young).

    Thin QR decompositions of both factors and the singular value decomposition of the small matrix
    between them, in float64. The factors of the result are balanced: ``up^T up == down @ down^T``,
    a diagonal matrix.

    Returns:
        An update of rank min(rank, p.rank, out, in) and scale 1, on p's device, in float32 or p's
        higher precision.

    Raises:
        ConfigError: The rank is not an integer of at least 1.
    """
    if not is_integer(rank):
        raise ConfigError(
            f"an update cannot be truncated to rank {quote(rank)}", fix="keep at least 1"
        )
    up, down = _HouseholderQR(to_float64(p.up)), _HouseholderQR(to_float64(p.down).T)
    u, s, vh = torch.linalg.svd(p.scale * (up.r @ down.r.T), full_matrices=False)
    root = s[:rank].sqrt()
    device, dtype = p.up.device, common_dtype([p])
    return LowRank(
        up.q_times(u[:, :rank] * root).to(device, dtype),
        down.q_times(vh[:rank].T * root).T.contiguous().to(device, dtype),
    )


class _HouseholderQR:
    """A thin QR decomposition with Q as a product of reflections, which is never made dense."""

    def __init__(self, tall: Tensor) -> None:
        self.reflections, self.tau = torch.geqrf(tall)
        self.r = self.reflections[: len(self.tau)].triu()

    def q_times(self, small: Tensor) -> Tensor:
        columns = torch.nn.functional.pad(small, (0, 0, 0, len(self.reflections) - len(small)))
        return torch.ormqr(self.reflections[:, : len(self.tau)], self.tau, columns)


@full_precision()
def truncate_randomized(p: LowRank, rank: int) -> LowRank:
    """Approximate :func:`truncate` for updates of nearly full rank, such as pruned ones.

    Subspace iteration from a fixed random start (Halko, Martinsson, Tropp, arXiv 0909.4061,
    algorithms 4.4 and 5.1) in the update's precision: the error is within one percent of the
    optimum. The update is made dense. Updates of less than twice the rank are passed to
    :func:`truncate`.

    Returns:
        As :func:`truncate`.

    Raises:
        ConfigError: The rank is not an integer of at least 1.
    """
    if not is_integer(rank):
        return truncate(p, rank)
    columns = rank + _OVERSAMPLING
    if 2 * columns >= min(p.rank, *p.shape):
        return truncate(p, rank)
    dense = to_dense(p)
    start = torch.randn(p.shape[1], columns, generator=torch.Generator().manual_seed(0))
    basis, _ = torch.linalg.qr(dense @ start.to(dense))
    for _ in range(_ITERATIONS):
        basis, _ = torch.linalg.qr(dense.T @ basis)
        basis, _ = torch.linalg.qr(dense @ basis)
    u, s, vh = torch.linalg.svd(basis.T @ dense, full_matrices=False)
    root = s[:rank].sqrt()
    return LowRank(basis @ (u[:, :rank] * root), root[:, None] * vh[:rank])

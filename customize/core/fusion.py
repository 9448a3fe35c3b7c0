"""Merging by what each update is to do on its own inputs, and on nobody else's.

A sum adds every update everywhere. Fusion asks for one update of the layer that does to the inputs
of each concept what that concept's own update does to them (the objective of gradient fusion,
Mix-of-Show, arXiv 2305.18292, eq. 4), and to those of generic prompts nothing::

    min over dW:  sum_i tr((dW - w_i dW_i) C_i (dW - w_i dW_i)^T)
                  + tr(dW C_0 dW^T) + ridge ||dW||^2

with C_i the second moment of the inputs of concept i, of trace 1, and C_0 that of all inputs which
are to be left alone. It is quadratic, so there is nothing to iterate::

    dW = sum_i w_i dW_i C_i A^-1,    A = sum_i C_i + C_0 + ridge I

Each ``dW_i C_i A^-1`` has the up-projection of ``dW_i``: a concept's down-projection is replaced by
one that is blind to what the others' prompts look like, and the merge is an ordinary LoRA of the
sum's rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from customize.core.lowrank import LowRank, check_mergeable, common_dtype
from customize.core.precision import full_precision
from customize.errors import ConceptError, ConfigError

# Chosen on concepts of the miniature world that are in no figure: from 3e-5 to 3e-4 it is alike,
# and from 1e-3 up more and more is lost.
RIDGE = 1e-4


class InputMoment:
    """The second moment ``sum x x^T`` of a layer's inputs, of which only a sketch is kept.

    The sketch is ``C @ test`` for a fixed random (width, columns) matrix with orthonormal columns;
    it gives the leading directions by the Nystrom approximation (Tropp et al., arXiv 1706.05736,
    algorithm 3). It is exact where ``columns`` is not below the width, or the inputs span no more.

    Attributes:
        count: inputs seen.
        energy: ``sum ||x||^2`` over them.
    """

    @full_precision()
    def __init__(self, width: int, columns: int = 128, device: torch.device | None = None) -> None:
        if width <= columns:
            test = torch.eye(width, dtype=torch.float64)
        else:
            generator = Generator().manual_seed(width)
            gaussian = torch.randn(width, columns, generator=generator, dtype=torch.float64)
            test, _ = torch.linalg.qr(gaussian)
        self._test = test.to(device, torch.float32)
        self._sketch = torch.zeros_like(self._test)
        self.count, self.energy = 0, 0.0

    @full_precision()
    def add(self, inputs: Tensor) -> None:
        """Count more inputs: (..., width), any floating dtype."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).to(self._test)
        self._sketch += rows.T @ (rows @ self._test)
        self.count += len(rows)
        self.energy += float(rows.square().sum())

    @full_precision()
    def factor(self, rank: int) -> Tensor:
        """The leading directions, times the roots of their shares of the energy.

        Returns:
            (at most rank, width), float32, on the CPU: ``factor.T @ factor`` is the moment over its
            trace, as near as the rank allows; rows with no energy to speak of are left out.

        Raises:
            ConceptError: no input was seen, or one was not finite.
        """
        if not self.energy or not math.isfinite(self.energy):
            raise ConceptError(
                "no inputs of the layer were recorded"
                if not self.count
                else f"the inputs of the layer have the energy {self.energy}",
                fix="record them while the model draws pictures that are finite",
            )
        test, sketch = (each.to("cpu", torch.float64) for each in (self._test, self._sketch))
        # Shifted, so that the small matrix is safely positive; taken off again at the end. The
        # shift is ten times as large where rounding of what was added up in float32 is above it.
        norm = float(torch.linalg.matrix_norm(sketch))
        for shift in (norm * 10.0**power for power in range(-7, 0)):
            shifted = sketch + shift * test
            small = test.T @ shifted
            root, failed = torch.linalg.cholesky_ex((small + small.T) / 2)
            if not failed:
                break
        else:
            raise ConceptError(
                "the second moment of the layer's inputs is not positive",
                fix="record them again, with mixed_precision no or bf16",
            )
        sketch = shifted
        tall = torch.linalg.solve_triangular(root, sketch.T, upper=False).T
        directions, values, _ = torch.linalg.svd(tall, full_matrices=False)
        shares = (values.square() - shift).clamp(min=0.0) / self.energy
        kept = shares[:rank] > 1e-6
        rows = shares[:rank].sqrt()[:, None] * directions[:, :rank].T
        return rows[kept].to(torch.float32).contiguous()


@full_precision()
def fusion(
    products: Sequence[LowRank],
    weights: Sequence[float],
    inputs: Sequence[Tensor],
    left_alone: Tensor | None = None,
    ridge: float = RIDGE,
) -> LowRank:
    """The update that does on each concept's inputs what its own update does; see above.

    Args:
        products: one update of the same weight for each concept, on one device.
        weights: as many, finite. A concept of weight 0 changes nothing and is kept from change.
        inputs: of each, (n_i, in): S_i with ``C_i = S_i^T S_i``, as :meth:`InputMoment.factor`
            gives them.
        left_alone: (n, in), the same of C_0; None: there are no others.
        ridge: how much of a concept's energy a direction must have to count; above 0.

    Returns:
        scale 1, of the sum of the ranks, float32 or the factors' higher precision.

    Raises:
        ConceptError: the shapes or devices differ.
        ConfigError: numbers that do not match, or a ridge out of its range.
    """
    check_mergeable(products, weights)
    if len(inputs) != len(products):
        raise ConfigError(
            f"the inputs of {len(inputs)} concepts were given for {len(products)} updates",
            fix="give those of each",
        )
    if not (math.isfinite(ridge) and ridge > 0):
        raise ConfigError(f"a ridge cannot be {ridge}", fix="give a number above 0")
    width = products[0].shape[1]
    factors = [*inputs, *([] if left_alone is None else [left_alone])]
    for factor in factors:
        if factor.ndim != 2 or factor.shape[1] != width:
            raise ConceptError(
                f"inputs of shape {tuple(factor.shape)} do not enter a layer of width {width}",
                fix="give factors of recorded inputs of this layer",
            )
    device, dtype = products[0].up.device, common_dtype(products)
    exact = [factor.to("cpu", torch.float64) for factor in factors]
    blind = _times_inverse(torch.cat(exact), ridge).split([len(factor) for factor in exact])
    ups, downs = [], []
    for p, weight, own, filtered in zip(products, weights, exact, blind, strict=False):
        ups.append((weight * p.scale) * p.up.to(dtype))
        down = (p.down.to("cpu", torch.float64) @ own.T) @ filtered
        downs.append(down.to(device, dtype))
    return LowRank(torch.cat(ups, dim=1), torch.cat(downs))


def _times_inverse(rows: Tensor, ridge: float) -> Tensor:
    """``S (S^T S + ridge I)^-1`` of (n, width) rows, by the smaller of the two sides."""
    n, width = rows.shape
    if n <= width:
        gram = rows @ rows.T + ridge * torch.eye(n, dtype=rows.dtype)
        return torch.cholesky_solve(rows, torch.linalg.cholesky(gram))
    moment = rows.T @ rows + ridge * torch.eye(width, dtype=rows.dtype)
    return torch.cholesky_solve(rows.T.contiguous(), torch.linalg.cholesky(moment)).T

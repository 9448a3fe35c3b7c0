"""The second moment of a layer's inputs, accumulated as a low-rank sketch."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from customize.core.precision import full_precision
from customize.errors import ConceptError


class InputMoment:
    """A sketch of the second moment ``C = sum x x^T`` of a layer's inputs.

    The sketch is ``C @ test`` for a fixed random (width, columns) matrix with orthonormal columns;
    it gives the leading directions by the Nystrom approximation (Tropp et al., arXiv 1706.05736,
    algorithm 3). It is exact if ``columns`` >= width, or if the inputs span at most ``columns``
    dimensions.

    Attributes:
        count: Number of inputs.
        energy: ``sum ||x||^2`` over them.
    """

    @full_precision()
    def __init__(self, width: int, columns: int = 128, device: torch.device | None = None) -> None:
        """Start with no inputs.

        Args:
            width: Input channels of the layer.
            columns: Columns of the sketch.
            device: Device of the sketch; None for the CPU.
        """
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
        """Add inputs.

        Args:
            inputs: (..., width), any floating dtype.
        """
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).to(self._test)
        self._sketch += rows.T @ (rows @ self._test)
        self.count += len(rows)
        self.energy += float(rows.square().sum())

    @full_precision()
    def factor(self, rank: int) -> Tensor:
        """Compute the leading directions, scaled by the roots of their shares of the energy.

        Args:
            rank: Most directions, at least 1.

        Returns:
            (at most ``rank``, width), float32, on the CPU. ``factor.T @ factor`` approximates the
            moment divided by its trace; directions with a share below 1e-6 are left out.

        Raises:
            ConceptError: If no inputs were added, or one was not finite.
        """
        if not self.energy or not math.isfinite(self.energy):
            raise ConceptError(
                "no inputs of the layer were recorded"
                if not self.count
                else f"the inputs of the layer have the energy {self.energy}",
                fix="record them while the model draws images that are finite",
            )
        test, sketch = (part.to("cpu", torch.float64) for part in (self._test, self._sketch))
        # A shift makes the small matrix positive and is subtracted at the end. It is ten times as
        # large where the rounding of the float32 sums exceeds it.
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
        is_significant = shares[:rank] > 1e-6
        rows = shares[:rank].sqrt()[:, None] * directions[:, :rank].T
        return rows[is_significant].to(torch.float32).contiguous()

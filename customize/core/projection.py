"""Removing a subspace from embeddings (DECOR, arXiv 2412.09169).

The paper's formula is ``X' = X - alpha X V V^T`` with V the right singular vectors of the unwanted
embeddings. The confidence that a row overlaps the subspace more than chance, and the strength that
keeps a share of a row's length, are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from customize.core.precision import full_precision
from customize.errors import ConfigError

# Singular values below this fraction of the largest are rounding errors of float32.
_RELATIVE_TOLERANCE = 1e-5
# Below any squared norm of embeddings: rows of zeros have the energy share 0.
_TINY = 1e-12


@full_precision()
def principal_directions(rows: Tensor, mean: Tensor | None = None) -> Tensor:
    """Return an orthonormal basis of the row space: the right singular vectors.

    Args:
        rows: (..., n, width) with n >= 1, any floating dtype.
        mean: (..., 1 or n, width), subtracted from the rows; None subtracts nothing.

    Returns:
        (..., k, width), float32, by decreasing singular value; k is the largest rank in the batch,
        0 for rows of zeros. Matrices of lower rank are padded with rows of zeros.
    """
    centred = rows.float() if mean is None else rows.float() - mean.float()
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    largest = values[..., 0] if mean is None else torch.linalg.matrix_norm(rows.float(), 2)
    # Rows that were computed in half precision have rounding errors in every direction.
    dtypes = {rows.dtype, rows.dtype if mean is None else mean.dtype}
    tolerance = max(_RELATIVE_TOLERANCE, *(torch.finfo(dtype).eps for dtype in dtypes))
    is_nonzero = values > tolerance * largest[..., None]
    rank = int(is_nonzero.sum(-1).max())
    return (directions * is_nonzero[..., None])[..., :rank, :]


@full_precision()
def project_out(rows: Tensor, directions: Tensor, strength: float | Tensor) -> Tensor:
    """Scale the component of rows in a subspace by ``1 - strength``: ``X - strength X V V^T``.

    Args:
        rows: (..., n, width), any floating dtype.
        directions: (..., k, width), orthonormal, as from :func:`principal_directions`.
        strength: From 0 (no change) over 1 (removed) to 2 (reversed). A tensor of shape (..., n)
            on the rows' device gives one for each row; its range is not checked, because reading
            it would wait for the device.

    Returns:
        The rows' shape and dtype; computed in float32.

    Raises:
        ConfigError: The strength is outside [0, 2] or not finite.
    """
    if not isinstance(strength, Tensor):
        check_strength(strength)
    exact = rows.float()
    factor = strength[..., None] if isinstance(strength, Tensor) else strength
    inside = (exact @ directions.mT) @ directions
    return (exact - factor * inside).to(rows.dtype)


def check_strength(strength: float) -> None:
    """Refuse a strength that :func:`project_out` does not take.

    Raises:
        ConfigError: The strength is outside [0, 2] or not finite.
    """
    if not 0.0 <= strength <= 2.0:
        raise ConfigError(
            f"strength {strength:g} is outside the range from 0 to 2",
            where="strength",
            fix="use 1 to remove what is avoided, less to weaken it",
        )


@full_precision()
def overlap_confidence(rows: Tensor, directions: Tensor) -> Tensor:
    """Return the confidence that rows overlap a subspace more than chance.

    A row of random direction has the share ``c = k / width`` of its squared length in a subspace of
    k dimensions on average, with a standard deviation of ``sqrt(2 c (1 - c) / (width + 2))``.

    Args:
        rows: (..., n, width), any floating dtype.
        directions: (..., k, width), orthonormal or zero, as from :func:`principal_directions`.

    Returns:
        (..., n), float32: 0 for shares up to c, 1 from two standard deviations above it, linear
        between. 0 where the subspace is the whole space.
    """
    share = _energy_share(rows, directions)
    width = rows.shape[-1]
    chance = directions.square().sum((-1, -2))[..., None] / width
    deviation = (2 * chance * (1 - chance).clamp_min(0.0) / (width + 2)).sqrt()
    confidence = ((share - chance) / (2 * deviation).clamp_min(_TINY)).clamp(0.0, 1.0)
    # For the whole space rounding leaves a deviation that is only almost 0.
    return torch.where(deviation > 1e-3, confidence, 0.0)


@full_precision()
def max_strength(rows: Tensor, directions: Tensor, min_length: float) -> Tensor:
    """Return the largest strength up to 1 at which every row keeps a fraction of its length.

    Where a subspace has the share ``s`` of a row's squared length, a strength ``a`` leaves the
    fraction ``sqrt(1 - s (1 - (1 - a)^2))`` of its length.

    Args:
        rows: (..., n, width), any floating dtype; n may be 0.
        directions: (k, width), orthonormal.
        min_length: The fraction to keep, in (0, 1].

    Returns:
        (...,), float32, in [0, 1].
    """
    shares = _energy_share(rows, directions)
    if not shares.shape[-1]:
        return shares.new_ones(shares.shape[:-1])
    largest = shares.amax(-1).clamp_min(_TINY)
    return 1.0 - (1.0 - (1.0 - min_length**2) / largest).clamp_min(0.0).sqrt()


def _energy_share(rows: Tensor, directions: Tensor) -> Tensor:
    """Return the share of each row's squared length in a subspace: (..., n), float32."""
    exact = rows.float()
    inside = (exact @ directions.mT).square().sum(-1)
    return inside / exact.square().sum(-1).clamp_min(_TINY)

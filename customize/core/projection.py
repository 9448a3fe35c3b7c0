"""Taking a span out of text embeddings (DECOR, arXiv 2412.09169).

The paper's: ``X' = X - alpha X V V^T``, with V the right singular vectors of the embeddings of what
is not wanted. Ours, as the paper's choices were not to be had: which rows these are, how many of
the vectors, whether what all texts share is taken out of the rows before, and how a row that has
to do with the span by chance alone is told from one that says it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from customize.core.precision import full_precision
from customize.errors import ConfigError

#: Singular values below this share of the largest are rounding, of float32.
_RELATIVE_TOLERANCE = 1e-5


@full_precision()
def principal_directions(
    rows: Tensor, rank: int | None = None, mean: Tensor | None = None
) -> Tensor:
    """The leading directions of some rows.

    Args:
        rows: (..., n, width), n at least 1, any floating dtype.
        rank: how many directions at most; None: all that the rows have.
        mean: (..., 1 or n, width), taken from each row before; None: nothing is.

    Returns:
        (..., k, width), float32, orthonormal: right singular vectors, of the largest singular value
        first; k is 0 where nothing is left of the rows. Of several matrices, those with fewer
        directions than another have zeros in their place.

    Raises:
        ConfigError: a rank below 1.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"a span cannot have rank {rank}", where="rank", fix="use at least 1")
    own = rows.float() if mean is None else rows.float() - mean.float()
    _, values, directions = torch.linalg.svd(own, full_matrices=False)
    largest = values[..., 0] if mean is None else torch.linalg.matrix_norm(rows.float(), 2)
    # What was computed in half precision has rounding of its own in every direction.
    dtypes = {rows.dtype, rows.dtype if mean is None else mean.dtype}
    rounding = max(_RELATIVE_TOLERANCE, *(torch.finfo(dtype).eps for dtype in dtypes))
    there = values > rounding * largest[..., None]
    count = int(there.sum(-1).max())
    return (directions * there[..., None])[..., : count if rank is None else min(count, rank), :]


@full_precision()
def project_out(rows: Tensor, directions: Tensor, strength: float | Tensor) -> Tensor:
    """Rows with less of a span: ``X - strength X V V^T``.

    What lies in the span is multiplied by ``1 - strength``: 0 leaves it, 1 removes it, and above
    1 it is turned round.

    Args:
        rows: (..., n, width), any floating dtype.
        directions: (..., k, width), as :func:`principal_directions` gives them.
        strength: in [0, 2]; or a tensor of (..., n), one for each row, on the rows' device and
            not checked, as reading it would wait for the device.

    Returns:
        rows' shape and dtype; computed in float32.

    Raises:
        ConfigError: a strength outside of [0, 2], or not finite.
    """
    if not isinstance(strength, Tensor):
        check_strength(strength)
    own = rows.float()
    factor = strength[..., None] if isinstance(strength, Tensor) else strength
    inside = (own @ directions.mT) @ directions
    return (own - factor * inside).to(rows.dtype)


def check_strength(strength: float) -> None:
    """Refuse what :func:`project_out` does not take.

    Raises:
        ConfigError: a strength outside of [0, 2], or not finite.
    """
    if not 0.0 <= strength <= 2.0:
        raise ConfigError(
            f"a strength of {strength:g} is not from 0 to 2",
            where="strength",
            fix="use 1 to remove what is avoided, less to weaken it",
        )


@full_precision()
def overlap_confidence(rows: Tensor, directions: Tensor) -> Tensor:
    """How surely rows have to do with a span, by the share of their square length in it.

    Of a row of no direction in particular that share is ``c = k / width`` in the mean, with a
    standard deviation of ``sqrt(2 c (1 - c) / (width + 2))``.

    Args:
        rows: (..., n, width), any floating dtype.
        directions: (..., k, width), as :func:`principal_directions` gives them, with its zeros.

    Returns:
        (..., n), float32: 0 where the share is c or less, 1 from two standard deviations above, and
        linear between. It is 0 where the span is all there is.
    """
    share = _energy_share(rows, directions)
    width = rows.shape[-1]
    chance = directions.square().sum((-1, -2))[..., None] / width
    spread = (2 * chance * (1 - chance).clamp_min(0.0) / (width + 2)).sqrt()
    # What rounding leaves of a span that is all there is, is no spread.
    sure = ((share - chance) / (2 * spread).clamp_min(1e-12)).clamp(0.0, 1.0)
    return torch.where(spread > 1e-3, sure, 0.0)


@full_precision()
def max_strength(rows: Tensor, directions: Tensor, kept: float) -> Tensor:
    """The largest strength, at most 1, at which each row keeps a share of its length.

    With ``o`` the share of a row's length that lies in the span, a strength ``a`` leaves
    ``sqrt(1 - o^2 (1 - (1 - a)^2))`` of the row.

    Args:
        rows: (..., n, width); n may be 0.
        directions: (k, width), as for :func:`project_out`.
        kept: in (0, 1].

    Returns:
        (...,), float32, in [0, 1].
    """
    inside = _energy_share(rows, directions)
    if not inside.shape[-1]:
        return inside.new_ones(inside.shape[:-1])
    most = inside.amax(-1).clamp_min(1e-12)
    return 1.0 - (1.0 - (1.0 - kept**2) / most).clamp_min(0.0).sqrt()


def _energy_share(rows: Tensor, directions: Tensor) -> Tensor:
    """(..., n), float32: how much of each row's square length lies in the span."""
    own = rows.float()
    return (own @ directions.mT).square().sum(-1) / own.square().sum(-1).clamp_min(1e-12)

"""OFT and BOFT: the change of a weight by rotations of its rows or columns.

kohya's sd-scripts and LyCORIS rotate the rows of a weight (its output channels); peft, OneTrainer
and newer sd-scripts rotate its columns (its input channels). All functions return the dense change
at full strength, in float32.

OFT: arXiv 2306.07280; BOFT: arXiv 2311.06243; OFTv2, with the Neumann series: arXiv 2506.19847.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from customize.core.precision import full_precision
from customize.errors import ConceptError

# Added to norms in denominators, as in LyCORIS and kohya.
_EPSILON = 1e-8


@full_precision()
def oft_row_delta(
    weight: Tensor, blocks: Tensor, limit: float | None, rescale: Tensor | None
) -> Tensor:
    """Return the change of a weight by OFT or BOFT of LyCORIS and sd-scripts, which rotate rows.

    Args:
        weight: (out, in) or (out, in, *kernel), any floating dtype.
        blocks: Generators of the rotations R of :func:`cayley_rotations`. OFT: (n, b, b) with
            n * b == out; the rows of block k are multiplied by ``R_k^T``. BOFT: (m, n, b, b), m
            stages that multiply rows by ``R``, where every stage pairs rows further apart.
        limit: The largest joint norm of the generators, divided by the number of rows; None for no
            limit.
        rescale: A factor for each row of the result, (out, 1, ...), or None.

    Returns:
        The weight's shape, float32.

    Raises:
        ConceptError: The shapes of the blocks and the weight do not match.
    """
    max_norm = None if limit is None else limit * weight.shape[0]
    return row_rotation_delta(weight, cayley_rotations(blocks.float(), max_norm), rescale)


@full_precision()
def row_rotation_delta(weight: Tensor, rotations: Tensor, rescale: Tensor | None) -> Tensor:
    """Return :func:`oft_row_delta` for rotations instead of their generators.

    Args:
        weight: (out, in) or (out, in, *kernel), any floating dtype.
        rotations: The rotations, (n, b, b) or (m, n, b, b).
        rescale: A factor for each row of the result, (out, 1, ...), or None.

    Returns:
        The weight's shape, float32.

    Raises:
        ConceptError: The shapes do not match.
    """
    base = weight.float()
    out = base.shape[0]
    if rotations.ndim not in (3, 4) or rotations.shape[-3] * rotations.shape[-1] != out:
        raise ConceptError(f"blocks of shape {tuple(rotations.shape)} do not rotate {out} rows")
    if rotations.ndim == 4 and rotations.shape[-1] % 2:
        raise ConceptError(
            f"blocks of {rotations.shape[-1]} rows cannot be halved, as BOFT has them"
        )
    rows = base.flatten(1)
    if rotations.ndim == 3:
        parts = rows.reshape(rotations.shape[0], rotations.shape[1], -1)
        rows = torch.einsum("knm,kni->kmi", rotations, parts).reshape(out, -1)
    else:
        for stage, rotation in enumerate(rotations):
            rows = _butterfly_stage(rows, rotation, 2**stage * rotations.shape[-1] // 2)
    if rescale is not None:
        if rescale.numel() != out:
            raise ConceptError(f"{rescale.numel()} factors do not rescale {out} rows")
        rows = rescale.float().reshape(out, 1) * rows
    return rows.reshape(base.shape) - base


@full_precision()
def validate_rotations(blocks: Tensor) -> Tensor:
    """Check that blocks are rotations, which older LyCORIS stores as ``oft_diag``.

    Args:
        blocks: (n, b, b) or (m, n, b, b), any floating dtype.

    Returns:
        The blocks in float32.

    Raises:
        ConceptError: A block is not orthogonal.
    """
    rotations = blocks.float()
    if rotations.ndim not in (3, 4) or rotations.shape[-1] != rotations.shape[-2]:
        raise ConceptError(f"blocks of shape {tuple(rotations.shape)} are not rotations")
    eye = torch.eye(rotations.shape[-1], dtype=rotations.dtype)
    # The tolerance is far above the rounding of half precision.
    if (rotations @ rotations.mT - eye).abs().max() > 0.05:
        raise ConceptError("oft_diag has blocks that are not rotations")
    return rotations


@full_precision()
def cayley_rotations(blocks: Tensor, max_norm: float | None) -> Tensor:
    """Return the Cayley transform ``(I + Q) (I - Q)^-1`` of ``Q = blocks - blocks^T``.

    Args:
        blocks: (..., b, b), float32 or float64.
        max_norm: Q is scaled down to this Frobenius norm over all blocks; None for no limit.

    Returns:
        Rotations of the blocks' shape and dtype.

    Raises:
        ConceptError: The blocks are not square.
    """
    if blocks.ndim < 2 or blocks.shape[-1] != blocks.shape[-2]:
        raise ConceptError(f"blocks of shape {tuple(blocks.shape)} are not square")
    skew = blocks - blocks.mT
    if max_norm is not None:
        length = torch.linalg.vector_norm(skew)
        skew = skew * (max_norm / (length + _EPSILON)).clamp_max(1.0)
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return torch.linalg.solve(eye - skew, eye + skew, left=False)


@full_precision()
def oft_column_delta(
    weight: Tensor,
    entries: Tensor,
    *,
    terms: int | None,
    limit: float | None = None,
    swapped: bool = False,
) -> Tensor:
    """Return the change of a weight by OFT of peft, which rotates blocks of columns.

    Args:
        weight: (out, in), or (out, in, *kernel), whose columns include the kernel.
        entries: (n, b * (b - 1) / 2): the entries above the diagonal of each block's generator,
            row by row, for n * b columns; n = 1 applies one rotation to all blocks.
        terms: Number of terms of the Neumann series that replaces the Cayley transform; None for
            the transform itself.
        limit: COFT's epsilon: every generator is scaled down to this Frobenius norm over sqrt(n).
        swapped: Whether weights are multiplied by R instead of its transpose, as in OneTrainer and
            sd-scripts for convolutions.

    Returns:
        The weight's shape, float32.

    Raises:
        ConceptError: The shapes of the entries and the weight do not match.
    """
    base = weight.float()
    rows = base.flatten(1)
    count = entries.shape[-1]
    side = (1 + math.isqrt(1 + 8 * count)) // 2
    if entries.ndim != 2 or side * (side - 1) // 2 != count:
        raise ConceptError(f"entries of shape {tuple(entries.shape)} are not of square blocks")
    blocks, remainder = divmod(rows.shape[1], side)
    if remainder or len(entries) not in (1, blocks):
        raise ConceptError(
            f"{len(entries)} blocks of {side} columns do not rotate {rows.shape[1]} columns"
        )
    upper = torch.zeros(len(entries), side, side, dtype=torch.float32)
    above = torch.triu_indices(side, side, 1)
    upper[:, above[0], above[1]] = entries.float()
    skew = upper - upper.mT
    if limit is not None:
        length = torch.linalg.vector_norm(skew, dim=(1, 2), keepdim=True)
        skew = skew * (limit / math.sqrt(len(skew)) / length.clamp_min(1e-30)).clamp_max(1.0)
    rotations = _inverse_cayley(skew) if terms is None else _neumann(skew, terms)
    parts = rows.reshape(len(rows), blocks, side)
    form = "orc,rck->ork" if swapped else "orc,rkc->ork"
    rotated = torch.einsum(form, parts, rotations.expand(blocks, side, side))
    return rotated.reshape(base.shape) - base


@full_precision()
def boft_column_delta(weight: Tensor, blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the change of a weight by BOFT of peft: columns rotated in stages, and rows scaled.

    Args:
        weight: (out, in), or (out, in, *kernel), whose columns include the kernel.
        blocks: (m, n, b, b) with n * b columns: the generators of each stage, which are halved.
        scales: (out, 1) or (1, out).

    Returns:
        The weight's shape, float32.

    Raises:
        ConceptError: The shapes do not match.
    """
    base = weight.float()
    rows = base.flatten(1)
    width = rows.shape[1]
    if blocks.ndim != 4 or blocks.shape[2] != blocks.shape[3]:
        raise ConceptError(f"blocks of shape {tuple(blocks.shape)} are not stages of square blocks")
    stages, count, side, _ = blocks.shape
    if count * side != width or scales.numel() != len(rows):
        raise ConceptError(
            f"blocks of shape {tuple(blocks.shape)} and {scales.numel()} scales do not fit a "
            f"weight of {len(rows)} rows and {width} columns"
        )
    if stages > 1 and (side % 2 or width % (2 ** (stages - 1) * side)):
        raise ConceptError(
            f"{stages} stages of {count} blocks of {side} do not fit {width} columns"
        )
    rotations = _inverse_cayley(0.5 * (blocks.float() - blocks.float().mT))
    columns = rows.T
    for stage, rotation in enumerate(rotations):
        order = (
            _butterfly_order(width, 2**stage * side, side // 2)
            if stages > 1
            else torch.arange(width)
        )
        grouped = columns[torch.argsort(order)].reshape(count, side, -1)
        columns = torch.einsum("kij,kjo->kio", rotation, grouped).reshape(width, -1)[order]
    return (scales.float().reshape(-1, 1) * columns.T).reshape(base.shape) - base


def _butterfly_order(width: int, segment: int, half: int) -> Tensor:
    """Return indices that put, in each segment, even chunks of ``half`` columns before odd ones."""
    chunks = torch.arange(width).reshape(-1, segment // half, half)
    return torch.cat([chunks[:, 0::2], chunks[:, 1::2]], dim=1).flatten()


def _inverse_cayley(skew: Tensor) -> Tensor:
    """Return ``(I - Q) (I + Q)^-1``, the Cayley transform with peft's sign."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype)
    return torch.linalg.solve(eye + skew, eye - skew, left=False)


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """Return ``I + 2 Q + 2 Q^2 + ... + Q^(terms - 1)``, peft's Neumann series."""
    total = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew).clone()
    if terms > 1:
        total += 2.0 * skew
    if terms > 2:
        power = skew @ skew
        total += 2.0 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total += 2.0 * power
        total += power @ skew
    return total


def _butterfly_stage(rows: Tensor, rotation: Tensor, stride: int) -> Tensor:
    """Apply one stage of BOFT: rotate groups of rows that are ``stride`` apart."""
    out, width = rows.shape
    count, side, _ = rotation.shape
    if out % (2 * stride):
        raise ConceptError(f"a stage that pairs rows {stride} apart does not fit {out} rows")
    grouped = rows.reshape(-1, 2, stride, width).transpose(1, 2).reshape(count, side, width)
    rotated = torch.einsum("bij,bjw->biw", rotation, grouped).reshape(-1, stride, 2, width)
    return rotated.transpose(1, 2).reshape(out, width)

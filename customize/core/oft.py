"""OFT and BOFT: rotations of a weight's rows or columns, as the change that they make.

Kohya's sd-scripts and LyCORIS turn the rows of a weight, which are what a layer puts out; peft,
OneTrainer and newer sd-scripts its columns, which are what it reads. All give the dense change at
full strength, of the weight's shape, in float32.

OFT: arXiv 2306.07280; BOFT: arXiv 2311.06243; OFTv2, with the Neumann series: arXiv 2506.19847.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from customize.core.precision import full_precision
from customize.errors import ConceptError

_EPSILON = 1e-8  # what LyCORIS and kohya add to a norm that they divide by


@full_precision()
def oft_row_delta(
    weight: Tensor, blocks: Tensor, limit: float | None, rescale: Tensor | None
) -> Tensor:
    """What OFT of LyCORIS and sd-scripts adds: each block of rows turned by its own rotation.

    Args:
        weight: (out, in) or (out, in, *kernel).
        blocks: (n, b, b) with n * b rows: the generators. Rows of block k become ``R_k^T`` times
            themselves, with R from :func:`cayley_rotations`. (m, n, b, b) for BOFT: m such stages,
            each ``R`` times rows that lie ever further apart.
        limit: the most that the generators' joint norm may be, divided by the rows; None for any.
        rescale: a factor for each row afterwards, (out, 1, ...), or None.

    Raises:
        ConceptError: the blocks do not fit the weight.
    """
    most = None if limit is None else limit * weight.shape[0]
    return row_rotation_delta(weight, cayley_rotations(blocks.float(), most), rescale)


@full_precision()
def row_rotation_delta(weight: Tensor, turns: Tensor, rescale: Tensor | None) -> Tensor:
    """:func:`oft_row_delta` by rotations (n, b, b) or (m, n, b, b) instead of their generators."""
    base = weight.float()
    out = base.shape[0]
    if turns.ndim not in (3, 4) or turns.shape[-3] * turns.shape[-1] != out:
        raise ConceptError(f"blocks of shape {tuple(turns.shape)} do not turn {out} rows")
    if turns.ndim == 4 and turns.shape[-1] % 2:
        raise ConceptError(f"blocks of {turns.shape[-1]} rows cannot be halved, as BOFT has them")
    rows = base.flatten(1)
    if turns.ndim == 3:
        parts = rows.reshape(turns.shape[0], turns.shape[1], -1)
        rows = torch.einsum("knm,kni->kmi", turns, parts).reshape(out, -1)
    else:
        for stage, turn in enumerate(turns):
            rows = _butterfly_stage(rows, turn, 2**stage * turns.shape[-1] // 2)
    if rescale is not None:
        if rescale.numel() != out:
            raise ConceptError(f"{rescale.numel()} factors do not rescale {out} rows")
        rows = rescale.float().reshape(out, 1) * rows
    return rows.reshape(base.shape) - base


@full_precision()
def validate_rotations(blocks: Tensor) -> Tensor:
    """Blocks that should be rotations themselves, as older LyCORIS stores them (``oft_diag``).

    Raises:
        ConceptError: they are not orthogonal.
    """
    turns = blocks.float()
    if turns.ndim not in (3, 4) or turns.shape[-1] != turns.shape[-2]:
        raise ConceptError(f"blocks of shape {tuple(turns.shape)} are not rotations")
    eye = torch.eye(turns.shape[-1], dtype=turns.dtype)
    if (turns @ turns.mT - eye).abs().max() > 0.05:  # half precision rounds by much less
        raise ConceptError("oft_diag has blocks that are not rotations")
    return turns


@full_precision()
def cayley_rotations(blocks: Tensor, most: float | None) -> Tensor:
    """The Cayley transform ``(I + Q) (I - Q)^-1`` of ``Q = blocks - blocks^T``.

    Args:
        blocks: (..., b, b).
        most: Q is scaled down to this Frobenius norm over all blocks; None for no limit.

    Raises:
        ConceptError: the blocks are not square.
    """
    if blocks.ndim < 2 or blocks.shape[-1] != blocks.shape[-2]:
        raise ConceptError(f"blocks of shape {tuple(blocks.shape)} are not square")
    skew = blocks - blocks.mT
    if most is not None:
        length = torch.linalg.vector_norm(skew)
        skew = skew * (most / (length + _EPSILON)).clamp_max(1.0)
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
    """What OFT of peft adds: each block of columns turned by its own rotation.

    Args:
        weight: (out, in), or (out, in, *kernel), whose columns count the kernel.
        entries: (n, b * (b - 1) / 2): of each block's generator the entries above the diagonal, row
            by row; n * b columns, or n = 1 for one rotation of all blocks.
        terms: of the Neumann series in place of the Cayley transform; None for the transform.
        limit: COFT's eps: each generator is scaled down to this Frobenius norm over sqrt(n).
        swapped: whether weights are multiplied with R itself, as OneTrainer and sd-scripts have it
            for convolutions, and not with its transpose.

    Raises:
        ConceptError: the entries do not fit the weight.
    """
    base = weight.float()
    rows = base.flatten(1)
    count = entries.shape[-1]
    side = (1 + math.isqrt(1 + 8 * count)) // 2
    if entries.ndim != 2 or side * (side - 1) // 2 != count:
        raise ConceptError(f"entries of shape {tuple(entries.shape)} are not of square blocks")
    blocks, rest = divmod(rows.shape[1], side)
    if rest or len(entries) not in (1, blocks):
        raise ConceptError(
            f"{len(entries)} blocks of {side} columns do not turn {rows.shape[1]} columns"
        )
    upper = torch.zeros(len(entries), side, side, dtype=torch.float32)
    above = torch.triu_indices(side, side, 1)
    upper[:, above[0], above[1]] = entries.float()
    skew = upper - upper.mT
    if limit is not None:
        length = torch.linalg.vector_norm(skew, dim=(1, 2), keepdim=True)
        skew = skew * (limit / math.sqrt(len(skew)) / length.clamp_min(1e-30)).clamp_max(1.0)
    turns = _inverse_cayley(skew) if terms is None else _neumann(skew, terms)
    parts = rows.reshape(len(rows), blocks, side)
    form = "orc,rck->ork" if swapped else "orc,rkc->ork"
    done = torch.einsum(form, parts, turns.expand(blocks, side, side))
    return done.reshape(base.shape) - base


@full_precision()
def boft_column_delta(weight: Tensor, blocks: Tensor, scales: Tensor) -> Tensor:
    """What BOFT of peft adds: columns turned in stages, and rows scaled.

    Args:
        weight: (out, in), or (out, in, *kernel), whose columns count the kernel.
        blocks: (m, n, b, b) with n * b columns: each stage's generators, that count half.
        scales: (out, 1) or (1, out).

    Raises:
        ConceptError: the parts do not fit the weight.
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
    turns = _inverse_cayley(0.5 * (blocks.float() - blocks.float().mT))
    columns = rows.T
    for stage, turn in enumerate(turns):
        order = (
            _butterfly_order(width, 2**stage * side, side // 2)
            if stages > 1
            else torch.arange(width)
        )
        near = columns[torch.argsort(order)].reshape(count, side, -1)
        columns = torch.einsum("kij,kjo->kio", turn, near).reshape(width, -1)[order]
    return (scales.float().reshape(-1, 1) * columns.T).reshape(base.shape) - base


def _butterfly_order(width: int, segment: int, half: int) -> Tensor:
    """In each segment first the even chunks of ``half`` columns, then the odd ones."""
    chunks = torch.arange(width).reshape(-1, segment // half, half)
    return torch.cat([chunks[:, 0::2], chunks[:, 1::2]], dim=1).flatten()


def _inverse_cayley(skew: Tensor) -> Tensor:
    """``(I - Q) (I + Q)^-1``, the transform by peft's sign."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype)
    return torch.linalg.solve(eye + skew, eye - skew, left=False)


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """``I + 2 Q + 2 Q^2 + ... + Q^(terms - 1)``, peft's series of so many terms."""
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


def _butterfly_stage(rows: Tensor, turn: Tensor, stride: int) -> Tensor:
    """One stage of BOFT: rows ``stride`` apart come together, are turned, and go back."""
    out, width = rows.shape
    count, side, _ = turn.shape
    if out % (2 * stride):
        raise ConceptError(f"a stage that pairs rows {stride} apart does not fit {out} rows")
    near = rows.reshape(-1, 2, stride, width).transpose(1, 2).reshape(count, side, width)
    done = torch.einsum("bij,bjw->biw", turn, near).reshape(-1, stride, 2, width)
    return done.transpose(1, 2).reshape(out, width)

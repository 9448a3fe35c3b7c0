"""Routing: each concept of a merged update acts at its own positions.

The down-projection of a merged update stacks those of the concepts, so the activation between the
two projections, (positions, ranks), has columns of one concept each. A mask of the same shape
multiplies it::

    y = x W^T + (x A^T * M) B^T,    M[p, r] = m_c(p),  c = owner of rank r

and confines each concept's update to its mask m_c, at no further call of the denoiser. Masks come
from cross-attention: the concept whose tokens a position attends to. Once found, they confine this
attention, too, by :func:`attention_bias`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from customize.core.lowrank import LowRank
from customize.core.precision import full_precision

# Attention to a concept is reduced at most by this factor.
_LEAST_ATTENTION = 1e-4

# The relative difference of factors that rounding to bfloat16 explains.
_ROUNDING = 1e-2

# The largest number of attention scores that are computed at once, unless those of one head are
# more: 256 MiB.
_MAX_SCORES = 2**26


@full_precision()
def rank_owners(up: Tensor, parts: Sequence[Tensor]) -> list[int] | None:
    """Find which part of a merge each column of its up-projection is.

    Args:
        up: (out, ranks), of the merged update.
        parts: For each concept its up-projection, (out, rank of the concept).

    Returns:
        For each column the index of its part; None if the columns are not multiples of the parts
        one after another, in any order.
    """
    if up.shape[1] != sum(part.shape[1] for part in parts):
        return None
    remaining = [index for index, part in enumerate(parts) if part.shape[1]]
    owners: list[int] = []
    while remaining:
        for index in remaining:
            part = parts[index].float()
            columns = up[:, len(owners) : len(owners) + part.shape[1]].to(part)
            if columns.shape == part.shape and _is_multiple(columns, part):
                owners += [index] * part.shape[1]
                remaining.remove(index)
                break
        else:
            return None
    return owners


def _factor(columns: Tensor, part: Tensor) -> Tensor:
    """Return f of columns = f * part."""
    square = part.square().sum()
    return (columns * part).sum() / square if square > 0 else square


def _is_multiple(columns: Tensor, part: Tensor) -> bool:
    return bool((columns - _factor(columns, part) * part).norm() <= _ROUNDING * columns.norm())


@full_precision()
def own_down(
    up: Tensor, owners: Sequence[int], updates: Sequence[LowRank], weights: Sequence[float]
) -> Tensor:
    """Return the down-projection by which each concept is itself beside a merged up-projection.

    A merge such as fusion changes each concept so that concepts disturb one another less. Where
    masks keep them apart this is not needed. With up-projection U = [f_1 B_1, f_2 B_2, ...] of the
    merge and updates w_c s_c B_c A_c of the concepts, it is [w_1 s_1 / f_1 A_1; ...].

    Args:
        up: (out, ranks), U.
        owners: For each rank the index of its concept; those of a concept are side by side.
        updates: For each concept its update.
        weights: For each concept its weight w_c.

    Returns:
        (ranks, in), float32.
    """
    rows: list[Tensor] = []
    start = 0
    for index in dict.fromkeys(owners):
        update = updates[index]
        part = update.up.to(up.device).float()
        factor = _factor(up[:, start : start + update.rank].float(), part)
        scale = weights[index] * update.scale / float(factor) if factor != 0 else 0.0
        rows.append(scale * update.down.to(up.device).float())
        start += update.rank
    return torch.cat(rows)


def rank_mask(masks: Tensor, owners: Sequence[int]) -> Tensor:
    """Return the mask M of a mid-activation.

    Args:
        masks: (batch, concepts, positions), in [0, 1].
        owners: For each rank the index of its concept.

    Returns:
        (batch, positions, ranks).
    """
    return masks[:, list(owners)].transpose(1, 2).contiguous()


@full_precision()
def resize_masks(masks: Tensor, rows: int, columns: int) -> Tensor:
    """Resize masks to another grid of the same picture; masks of ones stay exactly ones.

    Args:
        masks: (..., rows, columns), floating, in [0, 1].
        rows: Of the grid.
        columns: Of the grid.

    Returns:
        (..., rows, columns), float32, in [0, 1]: means over cells, linear between smaller ones.
    """
    # The complement is resized, since the weights of a linear interpolation add up to nearly 1.
    rest = 1.0 - masks.float().reshape(-1, 1, *masks.shape[-2:])
    if rows < masks.shape[-2] or columns < masks.shape[-1]:
        rest = functional.interpolate(rest, (rows, columns), mode="area")
    else:
        rest = functional.interpolate(rest, (rows, columns), mode="bilinear", align_corners=False)
    return (1.0 - rest).clamp(0.0, 1.0).reshape(*masks.shape[:-2], rows, columns)


def grid_of_tokens(tokens: int, rows: int, columns: int) -> tuple[int, int] | None:
    """Return the grid of a UNet's layer, which halves that of the latents k times.

    Args:
        tokens: Positions of the layer.
        rows: Of the latents.
        columns: Of the latents.

    Returns:
        (rows, columns) of the layer; None if no number of halvings gives as many positions.
    """
    while rows * columns > tokens and rows * columns > 1:
        rows, columns = -(-rows // 2), -(-columns // 2)
    return (rows, columns) if rows * columns == tokens else None


@full_precision()
def attention_to_tokens(
    query: Tensor, key: Tensor, heads: int, scale: float, valid: Tensor | None = None
) -> Tensor:
    """Return how much each position attends to each token, in the mean over the heads.

    Args:
        query: (batch, positions, width), any floating dtype.
        key: (batch, tokens, width).
        heads: Number of attention heads, which share the width.
        scale: Factor of the scores, usually 1 / sqrt(width of a head).
        valid: (batch, tokens), boolean: false for padding, which no position attends to.

    Returns:
        (batch, positions, tokens), float32; each position's sum is 1.
    """
    q, k = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
    total = torch.zeros(*query.shape[:2], key.shape[1], device=query.device)
    step = max(1, _MAX_SCORES // total.numel())
    for first in range(0, heads, step):
        scores = scale * q[:, first : first + step] @ k[:, first : first + step].transpose(-1, -2)
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None, None], -torch.inf)
        total += scores.softmax(-1).sum(1)
    return total / heads


@full_precision()
def smooth_maps(maps: Tensor) -> Tensor:
    """Return the means over neighbourhoods of 3 x 3; borders repeat.

    Args:
        maps: (..., rows, columns), floating.
    """
    flat = maps.float().reshape(-1, 1, *maps.shape[-2:])
    padded = functional.pad(flat, (1, 1, 1, 1), mode="replicate")
    return functional.avg_pool2d(padded, 3, stride=1).reshape(maps.shape)


@full_precision()
def competing_masks(maps: Tensor, temperature: float) -> Tensor:
    """Return soft masks by which concepts share the picture: m_c = softmax_c(s_c / temperature).

    s_c is the concept's smoothed map relative to its mean over the picture, so that tokens that
    are attended to little everywhere have their place too. For two concepts this is the sigmoid of
    the difference.

    Args:
        maps: (concepts, rows, columns), not negative: what positions attend to each concept.
        temperature: Above 0: the difference at which one concept has e times the other's weight.

    Returns:
        (concepts, rows, columns), float32; the sum over the concepts is 1 everywhere.
    """
    smooth = smooth_maps(maps)
    mean = smooth.mean((-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.softmax(smooth / mean / temperature, dim=0)


@full_precision()
def attention_bias(masks: Tensor, tokens: Sequence[Sequence[int]], length: int) -> Tensor:
    """Return what is added to the scores of an attention, by which masks confine its concepts.

    A position p attends to the tokens of concept c in proportion to the concept's mask, relative to
    its mean over the picture::

        b[p, t] = log(m_c(p) / mean(m_c))  for the tokens t of c,  0 for the other words

    So the attention to a concept is moved into its mask, and a mask of one value changes nothing.

    Args:
        masks: (concepts, positions), in [0, 1].
        tokens: For each concept the positions of its tokens.
        length: The number of tokens.

    Returns:
        (positions, length), float32.
    """
    masks = masks.float()
    shares = masks.clamp(min=_LEAST_ATTENTION) / masks.mean(1, True).clamp(min=_LEAST_ATTENTION)
    bias = torch.zeros(masks.shape[1], length, device=masks.device)
    for share, positions in zip(shares, tokens, strict=True):
        bias[:, list(positions)] = share.log()[:, None]
    return bias

"""Orthogonal bases and their slices (Orthogonal Adaptation, arXiv 2312.02432, section 3.4).

Two concepts whose frozen down-projections are disjoint column slices of one orthogonal matrix
have updates with ``dW_i dW_j^T = 0``, so their plain sum keeps each on the other's complement.

A *basis* is ``fn(width, columns, seed) -> Tensor`` of shape (width, len(columns)), float32: the
named columns of one orthogonal (width x width) matrix that (width, seed) fixes for everybody.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from customize.core.precision import full_precision
from customize.errors import ConfigError

Columns = Sequence[int] | Tensor
Basis = Callable[[int, Columns, int], Tensor]

_MAX_UINT64 = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15

# Independent streams of the hash; the numbers are part of the file format, never reuse one.
_ROW_SIGNS, _ROW_ORDER, _COLUMN_ORDER, _RADII, _ANGLES = range(1, 6)


@full_precision()
def cosine(width: int, columns: Columns, seed: int) -> Tensor:
    """Columns of a signed and permuted discrete cosine transform (DCT-II, orthonormal).

    ``O[n, c] = sign[n] * C[p[c], q[n]]`` with hashed signs and permutations p, q. The signs keep
    every column, the constant one included, from being a direction that inputs share (their
    mean); no entry exceeds sqrt(2 / width), so no column leans on a few channels.

    Costs O(width * len(columns)) and uses only integer arithmetic and correctly rounded float64
    operations, so the bits are the same on every machine and library version.

    Args:
        width: rows of the orthogonal matrix, >= 1.
        columns: distinct column numbers in [0, width), a sequence or a 1-d integer tensor.
        seed: in [0, 2**64).

    Returns:
        (width, len(columns)), float32, on the CPU, orthonormal columns.

    Raises:
        ConfigError: a number is out of its range, or a column is named twice.
    """
    chosen = _validate_columns(width, columns, seed)
    frequency = _permutation(seed, width, _COLUMN_ORDER)[chosen]
    position = _permutation(seed, width, _ROW_ORDER)
    sign = 1.0 - 2.0 * (_hash(seed, width, _ROW_SIGNS, width) >> np.uint64(63)).astype(np.float64)

    # cos(pi * m / (2 * width)) for integer m, folded into the first quadrant: exact, so that a
    # table of width + 1 cosines serves every entry however high the frequency.
    m = ((2 * position + 1)[:, None] * frequency[None, :]) % (4 * width)
    m = np.where(m > 2 * width, 4 * width - m, m)
    quadrant = np.where(m > width, -1.0, 1.0)
    cosines = _quarter_wave(width)[np.where(m > width, 2 * width - m, m)]

    norm = np.where(frequency == 0, math.sqrt(1.0 / width), math.sqrt(2.0 / width))
    entries = (quadrant * cosines) * norm[None, :] * sign[:, None]
    return torch.from_numpy(entries.astype(np.float32))


@full_precision()
def gaussian_qr(width: int, columns: Columns, seed: int) -> Tensor:
    """Columns of the Q factor of a Gaussian matrix: the paper's randomized orthogonal basis.

    Q's signs are fixed by a positive diagonal of R, which also makes it Haar distributed. The
    whole matrix is computed, O(width**3) in float64, and the latest few are cached. The Gaussian
    is hashed, so it does not change with a library's random stream; the factorisation is the
    linear algebra library's, so the result repeats to rounding and not to the bit.

    Arguments, result and errors as :func:`cosine`.
    """
    chosen = _validate_columns(width, columns, seed)
    return _gaussian_q(width, seed)[:, torch.from_numpy(chosen)]


BASES: dict[str, Basis] = {"cosine": cosine, "gaussian_qr": gaussian_qr}


def capacity(width: int, rank: int) -> int:
    """How many disjoint blocks of ``rank`` columns a basis of ``width`` holds: ``width // rank``.

    Raises:
        ConfigError: rank is below 1 or above width.
    """
    if not 1 <= rank <= width:
        raise ConfigError(
            f"rank {rank} does not fit a layer of input width {width}",
            fix=f"choose a rank from 1 to {width}",
        )
    return width // rank


def block(index: int, width: int, rank: int) -> tuple[int, ...]:
    """The ``index``-th of the disjoint blocks of ``rank`` neighbouring columns.

    Raises:
        ConfigError: the rank does not fit the width, or index is outside [0, capacity).
    """
    limit = capacity(width, rank)
    if not 0 <= index < limit:
        raise ConfigError(
            f"block {index} does not exist: width {width} has capacity for {limit} disjoint "
            f"blocks of rank {rank} (0 to {limit - 1})",
            fix="free a block, use a smaller rank, or share a block and accept the crosstalk",
        )
    return tuple(range(index * rank, (index + 1) * rank))


def hashed_block(name: str, width: int, rank: int) -> tuple[int, ...]:
    """The block that a concept made without a coordinator takes: sha256(name) modulo capacity.

    The blocks are those of :func:`block`, so two concepts of equal rank share either all columns
    or none. Two names collide with probability 1 / capacity.

    Raises:
        ConfigError: the rank does not fit the width.
    """
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")
    return block(digest % capacity(width, rank), width, rank)


def shared_columns(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """The columns that two slices have in common, ascending; empty means exact orthogonality."""
    return tuple(sorted(set(a) & set(b)))


def down_projection(
    basis: Basis, width: int, columns: Columns, seed: int, scale: float = 1.0
) -> Tensor:
    """The frozen down-projection of a concept: ``scale * O[:, columns]^T``.

    The paper has orthonormal rows (scale 1); its published code divides them by two (scale 0.5),
    which only slows the up-projection's learning and halves its effect.

    Returns:
        (len(columns), width), float32, contiguous.

    Raises:
        ConfigError: as the basis.
    """
    return (scale * basis(width, columns, seed).T).contiguous()


def count_shared_directions(width: int, most: int) -> int:
    """How many leading directions of a layer's inputs a slice stays out of: ``most``, or an eighth
    of the width where that is less."""
    return min(most, width // 8)


@full_precision()
def complement_projection(
    basis: Basis, directions: Tensor, columns: Columns, seed: int, scale: float = 1.0
) -> Tensor:
    """A down-projection that is blind to some directions: slices of a basis of all others.

    Householder reflections that carry the first k unit vectors to the k directions carry the
    columns of a (width - k) basis, laid into the other coordinates, into the complement. So slices
    are as disjoint there as in :func:`down_projection`, at a cost of O(width * k * r).

    Args:
        directions: (k, width), linearly independent; k = 0 gives :func:`down_projection`.
        columns: of the basis of width ``width - k``.

    Returns:
        (len(columns), width), float32, contiguous: rows orthogonal to each other and to the
        directions, of length ``scale``.

    Raises:
        ConfigError: as the basis.
    """
    count, width = directions.shape
    rest = basis(width - count, columns, seed).double()
    laid = torch.cat([rest.new_zeros(count, rest.shape[1]), rest])
    if count:
        reflectors, tau = torch.geqrf(directions.double().T.contiguous())
        laid = torch.ormqr(reflectors, tau, laid)
    return (scale * laid.T).float().contiguous()


def _validate_columns(width: int, columns: Columns, seed: int) -> NDArray[np.int64]:
    if width < 1:
        raise ConfigError(
            f"an orthogonal matrix cannot have width {width}", fix="give a width of at least 1"
        )
    if not 0 <= seed <= _MAX_UINT64:
        raise ConfigError(
            f"the orthogonal matrix's seed {seed} is not an unsigned 64-bit number",
            fix="choose a seed from 0 to 2**64 - 1",
        )
    listed = columns.tolist() if isinstance(columns, Tensor) else list(columns)
    outside = [c for c in listed if not 0 <= c < width]
    if outside:
        raise ConfigError(
            f"columns {outside} do not exist in an orthogonal matrix of width {width}",
            fix=f"name columns from 0 to {width - 1}",
        )
    if len(set(listed)) != len(listed):
        raise ConfigError(
            f"the slice {listed} names a column twice, so it would not be orthonormal",
            fix="name each column once",
        )
    return np.array(listed, dtype=np.int64)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), a bijection of 64-bit words."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _hash(seed: int, width: int, stream: int, count: int) -> NDArray[np.uint64]:
    """``count`` pseudo-random words of splitmix64, started from (seed, width, stream)."""
    start = np.zeros(1, dtype=np.uint64)
    for word in (seed, width, stream):
        start = _mix((start ^ np.uint64(word)) + np.uint64(_GOLDEN_GAMMA))
    steps = np.arange(1, count + 1, dtype=np.uint64)
    return _mix(start + steps * np.uint64(_GOLDEN_GAMMA))


def _permutation(seed: int, width: int, stream: int) -> NDArray[np.int64]:
    # A stable sort, so that even equal hashes have one order.
    order = np.argsort(_hash(seed, width, stream, width), kind="stable")
    return order.astype(np.int64)


def _quarter_wave(width: int) -> NDArray[np.float64]:
    """cos(pi * m / (2 * width)) for m = 0 .. width, within 1e-15.

    By Taylor's series and not ``np.cos``: sums and products round alike on every machine,
    mathematical libraries do not. The first term left out is below 1e-21 at pi / 2.
    """
    square = (np.arange(width + 1, dtype=np.float64) * (math.pi / (2 * width))) ** 2
    total = np.zeros_like(square)
    for power in range(24, -1, -2):
        coefficient = (1.0 if power % 4 == 0 else -1.0) / math.factorial(power)
        total = total * square + coefficient
    return total


@lru_cache(maxsize=8)
def _gaussian_q(width: int, seed: int) -> Tensor:
    count = width * width
    # The top 53 bits, centred in their cells: uniform on the open interval (0, 1).
    radius, angle = (
        ((_hash(seed, width, stream, count) >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
        for stream in (_RADII, _ANGLES)
    )
    normal = np.sqrt(-2.0 * np.log(radius)) * np.cos(2.0 * math.pi * angle)  # Box-Muller
    q, r = np.linalg.qr(normal.reshape(width, width))
    signs = np.where(np.diagonal(r) < 0, -1.0, 1.0)
    return torch.from_numpy((q * signs[None, :]).astype(np.float32))

"""Orthogonal bases and their slices (Orthogonal Adaptation, arXiv 2312.02432, section 3.4).

A *slice* is a set of columns of an orthogonal matrix. Two concepts whose frozen down-projections
are disjoint slices of one matrix have updates with ``dW_i dW_j^T = 0``: their sum does not mix.

A *basis* is ``fn(width, columns, seed) -> Tensor`` of shape (width, len(columns)), float32: the
given columns of one orthogonal (width x width) matrix, which depends on (width, seed) only.
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

# Independent streams of the hash. The numbers are part of the file format: never reuse one.
_ROW_SIGNS, _ROW_ORDER, _COLUMN_ORDER, _RADII, _ANGLES = range(1, 6)


@full_precision()
def cosine(width: int, columns: Columns, seed: int) -> Tensor:
    """Return columns of a signed and permuted discrete cosine transform (DCT-II, orthonormal).

    ``O[n, c] = sign[n] * C[p[c], q[n]]`` with hashed signs and permutations p, q. Because of the
    signs no column, the constant one included, is a direction that inputs share, such as their
    mean. No entry exceeds sqrt(2 / width), so no column depends on a few channels only.

    The cost is O(width * len(columns)). Only integer arithmetic and correctly rounded float64
    operations are used, so the result is the same to the bit on all machines.

    Args:
        width: The number of rows of the orthogonal matrix, >= 1.
        columns: Distinct column numbers in [0, width), as a sequence or a 1-d integer tensor.
        seed: In [0, 2**64).

    Returns:
        (width, len(columns)), float32, on the CPU, with orthonormal columns.

    Raises:
        ConfigError: A number is out of its range, or a column is given twice.
    """
    indices = _validate_columns(width, columns, seed)
    frequency = _permutation(seed, width, _COLUMN_ORDER)[indices]
    position = _permutation(seed, width, _ROW_ORDER)
    sign = 1.0 - 2.0 * (_hash(seed, width, _ROW_SIGNS, width) >> np.uint64(63)).astype(np.float64)

    # cos(pi * m / (2 * width)) for integer m, folded into the first quadrant exactly, so that a
    # table of width + 1 cosines contains every entry, whatever the frequency.
    m = ((2 * position + 1)[:, None] * frequency[None, :]) % (4 * width)
    m = np.where(m > 2 * width, 4 * width - m, m)
    quadrant = np.where(m > width, -1.0, 1.0)
    cosines = _quarter_wave(width)[np.where(m > width, 2 * width - m, m)]

    norm = np.where(frequency == 0, math.sqrt(1.0 / width), math.sqrt(2.0 / width))
    entries = (quadrant * cosines) * norm[None, :] * sign[:, None]
    return torch.from_numpy(entries.astype(np.float32))


@full_precision()
def gaussian_qr(width: int, columns: Columns, seed: int) -> Tensor:
    """Return columns of the Q factor of a Gaussian matrix: the paper's random orthogonal basis.

    The diagonal of R is positive, which determines the signs of Q and makes it Haar distributed.
    The full matrix is computed in float64 at a cost of O(width**3), and the last few are cached.
    The Gaussian numbers are hashed, so they do not depend on a library's random generator. The
    decomposition is the linear algebra library's, so results repeat up to rounding.

    Arguments, result and errors are those of :func:`cosine`.
    """
    indices = _validate_columns(width, columns, seed)
    return _gaussian_q(width, seed)[:, torch.from_numpy(indices)]


BASES: dict[str, Basis] = {"cosine": cosine, "gaussian_qr": gaussian_qr}


def capacity(width: int, rank: int) -> int:
    """Return the number of disjoint blocks of ``rank`` columns in a basis: ``width // rank``.

    Raises:
        ConfigError: The rank is below 1 or above the width.
    """
    if not 1 <= rank <= width:
        raise ConfigError(
            f"rank {rank} does not fit a layer of input width {width}",
            fix=f"choose a rank from 1 to {width}",
        )
    return width // rank


def block(index: int, width: int, rank: int) -> tuple[int, ...]:
    """Return the column numbers of a block of ``rank`` adjacent columns.

    Raises:
        ConfigError: The rank does not fit the width, or the index is outside [0, capacity).
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
    """Return the block of a concept without a library: sha256(name) modulo the capacity.

    Two concepts of equal rank share all columns or none. The probability that two names collide is
    1 / capacity.

    Raises:
        ConfigError: The rank does not fit the width.
    """
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")
    return block(digest % capacity(width, rank), width, rank)


def shared_columns(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """Return the columns that two slices share, in ascending order; empty if orthogonal."""
    return tuple(sorted(set(a) & set(b)))


def down_projection(
    basis: Basis, width: int, columns: Columns, seed: int, scale: float = 1.0
) -> Tensor:
    """Return the frozen down-projection of a concept: ``scale * O[:, columns]^T``.

    The rows are orthonormal in the paper (scale 1). The published code divides them by two (scale
    0.5), which slows the training of the up-projection and halves its effect.

    Returns:
        (len(columns), width), float32, contiguous.

    Raises:
        ConfigError: As the basis.
    """
    return (scale * basis(width, columns, seed).T).contiguous()


def count_shared_directions(width: int, limit: int) -> int:
    """Return the number of leading input directions that slices avoid: at most an eighth."""
    return min(limit, width // 8)


@full_precision()
def complement_projection(
    basis: Basis, directions: Tensor, columns: Columns, seed: int, scale: float = 1.0
) -> Tensor:
    """Return a slice of an orthonormal basis of the complement of some directions.

    Householder reflections map the first k unit vectors to the k directions, and so the columns of
    a basis of width ``width - k``, embedded into the other coordinates, into the complement.
    Disjoint slices stay orthogonal. The cost is O(width * k * r).

    Args:
        basis: The orthogonal basis.
        directions: (k, width), linearly independent; k = 0 gives :func:`down_projection`.
        columns: Column numbers of the basis of width ``width - k``.
        seed: In [0, 2**64).
        scale: The length of the rows.

    Returns:
        (len(columns), width), float32, contiguous, with rows orthogonal to one another and to the
        directions.

    Raises:
        ConfigError: As the basis.
    """
    count, width = directions.shape
    columns_of_complement = basis(width - count, columns, seed).double()
    zeros = columns_of_complement.new_zeros(count, columns_of_complement.shape[1])
    embedded = torch.cat([zeros, columns_of_complement])
    if count:
        reflectors, tau = torch.geqrf(directions.double().T.contiguous())
        embedded = torch.ormqr(reflectors, tau, embedded)
    return (scale * embedded.T).float().contiguous()


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
    numbers = columns.tolist() if isinstance(columns, Tensor) else list(columns)
    outside = [c for c in numbers if not 0 <= c < width]
    if outside:
        raise ConfigError(
            f"columns {outside} do not exist in an orthogonal matrix of width {width}",
            fix=f"give columns from 0 to {width - 1}",
        )
    if len(set(numbers)) != len(numbers):
        raise ConfigError(
            f"the slice {numbers} contains a column twice, so it is not orthonormal",
            fix="give every column once",
        )
    return np.array(numbers, dtype=np.int64)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finalizer of splitmix64 (Steele, Lea and Flood 2014), a bijection of 64 bits."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _hash(seed: int, width: int, stream: int, count: int) -> NDArray[np.uint64]:
    """Return ``count`` pseudo-random words of splitmix64, seeded with (seed, width, stream)."""
    start = np.zeros(1, dtype=np.uint64)
    for word in (seed, width, stream):
        start = _mix((start ^ np.uint64(word)) + np.uint64(_GOLDEN_GAMMA))
    steps = np.arange(1, count + 1, dtype=np.uint64)
    return _mix(start + steps * np.uint64(_GOLDEN_GAMMA))


def _permutation(seed: int, width: int, stream: int) -> NDArray[np.int64]:
    # A stable sort, so that equal hashes have a defined order.
    order = np.argsort(_hash(seed, width, stream, width), kind="stable")
    return order.astype(np.int64)


def _quarter_wave(width: int) -> NDArray[np.float64]:
    """Return cos(pi * m / (2 * width)) for m = 0 .. width, within 1e-15.

    By the Taylor series and not ``np.cos``: sums and products are rounded equally on all machines,
    functions of mathematical libraries are not. The first omitted term is below 1e-21 at pi / 2.
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

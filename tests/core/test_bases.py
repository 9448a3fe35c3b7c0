"""Bases are orthonormal, repeatable and sliced into disjoint blocks."""

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from customize.core.bases import (
    BASES,
    block,
    capacity,
    cosine,
    down_projection,
    gaussian_qr,
    hashed_block,
    shared_columns,
)
from customize.errors import ConfigError

ALL = pytest.mark.parametrize("basis", list(BASES.values()), ids=list(BASES))
MASK = (1 << 64) - 1


def _off_identity(columns: torch.Tensor) -> float:
    exact = columns.double()
    return (exact.T @ exact - torch.eye(exact.shape[1])).abs().max().item()


@ALL
@settings(deadline=None, max_examples=25)
@given(width=st.integers(1, 96), seed=st.integers(0, MASK))
def test_the_full_matrix_is_orthogonal(basis, width, seed):
    matrix = basis(width, range(width), seed)
    assert matrix.shape == (width, width)
    assert matrix.dtype == torch.float32
    assert _off_identity(matrix) < 1e-6


@ALL
@pytest.mark.parametrize("width", [320, 768])
def test_disjoint_blocks_are_orthogonal(basis, width):
    blocks = [basis(width, block(i, width, 20), 0) for i in range(capacity(width, 20))]
    assert all(_off_identity(each) < 1e-6 for each in blocks)
    for other in blocks[1:]:
        assert (blocks[0].double().T @ other.double()).abs().max() < 1e-6


@ALL
@settings(deadline=None, max_examples=25)
@given(data=st.data(), width=st.integers(2, 64))
def test_columns_do_not_depend_on_the_other_columns_requested(basis, data, width):
    columns = data.draw(st.lists(st.integers(0, width - 1), min_size=1, unique=True))
    assert torch.equal(basis(width, columns, 3), basis(width, range(width), 3)[:, columns])
    assert torch.equal(basis(width, torch.tensor(columns), 3), basis(width, columns, 3))


@ALL
def test_seed_and_width_change_the_matrix_and_torch_seed_does_not(basis):
    torch.manual_seed(0)
    first = basis(64, range(8), 1)
    torch.manual_seed(1)
    assert torch.equal(first, basis(64, range(8), 1))
    # Columns of another seed are strangers, not a reordering of the same ones.
    assert (first.T @ basis(64, range(64), 2)).abs().max() < 0.9
    assert not torch.equal(first[:32], basis(32, range(8), 1))


@ALL
def test_changing_a_returned_slice_has_no_side_effects(basis):
    basis(16, range(16), 5).zero_()
    assert _off_identity(basis(16, range(16), 5)) < 1e-6


def test_cosine_matches_stored_hashes():
    # The digests stand for files that exist: they may change only with the format's version.
    digest = hashlib.sha256(cosine(320, range(20), 0).numpy().tobytes()).hexdigest()
    assert digest == "852ec7b890bfe9a11566628d1af981fb16826572ee90ebe1ecd590a17237f59e"
    digest = hashlib.sha256(cosine(768, (5, 700, 767), MASK).numpy().tobytes()).hexdigest()
    assert digest == "baac487006ff00752dfece4fbdfb25a5bb7d7faea9bc4f9ac6b8ec4c139e01e0"


def test_cosine_golden_values():
    golden = torch.tensor(
        [
            [-0.0173214749, 0.0689768642, -0.0767810717, -0.0458383635],
            [-0.0320371389, 0.0717950240, 0.0218324922, -0.0727385581],
            [0.0320371389, 0.0775378868, 0.0623242557, -0.0406433903],
        ]
    )
    assert (cosine(320, range(4), 0)[:3] - golden).abs().max() < 1e-7


def _words(seed: int, width: int, stream: int, count: int) -> list[int]:
    """The hash once more, in plain integers."""

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
        return z ^ (z >> 31)

    gamma = 0x9E3779B97F4A7C15
    assert mix(gamma) == 0xE220A8397B1DCDAF  # splitmix64's published first word for seed 0
    state = 0
    for word in (seed, width, stream):
        state = mix(((state ^ word) + gamma) & MASK)
    return [mix((state + (i + 1) * gamma) & MASK) for i in range(count)]


@settings(deadline=None, max_examples=25)
@given(width=st.integers(1, 40), seed=st.integers(0, MASK))
def test_cosine_is_the_documented_signed_permuted_transform(width, seed):
    signs, rows, columns = (_words(seed, width, stream, width) for stream in (1, 2, 3))
    row_order, column_order = (
        sorted(range(width), key=words.__getitem__) for words in (rows, columns)
    )
    expected = torch.tensor(
        [
            [
                (-1 if signs[n] >> 63 else 1)
                * math.sqrt((1 if column_order[c] == 0 else 2) / width)
                * math.cos(math.pi * (2 * row_order[n] + 1) * column_order[c] / (2 * width))
                for c in range(width)
            ]
            for n in range(width)
        ]
    )
    assert (cosine(width, range(width), seed) - expected).abs().max() < 1e-7


def test_cosine_columns_are_spread_and_none_is_the_mean():
    matrix = cosine(640, range(640), 0)
    assert matrix.abs().max() <= math.sqrt(2 / 640) + 1e-7
    mean = torch.full((640,), 640**-0.5)
    assert (mean @ matrix).abs().max() < 0.25


def test_gaussian_qr_is_repeatable_and_haar_like():
    matrix = gaussian_qr(64, range(64), 7)
    golden = torch.tensor([0.0153914234, -0.0321957357, 0.2514039576])
    assert (matrix[0, :3] - golden).abs().max() < 1e-6
    # Entries of a Haar orthogonal matrix have variance 1 / width and fourth moment near 3 times
    # its square: a broken Box-Muller or hash would show here.
    scaled = matrix * 8
    assert scaled.mean().abs() < 0.05
    assert abs(scaled.pow(4).mean().item() - 3 * 64 / 66) < 0.4


@settings(deadline=None)
@given(rank=st.integers(1, 50), data=st.data())
def test_blocks_tile_the_width(rank, data):
    width = data.draw(st.integers(rank, 400))
    blocks = [block(i, width, rank) for i in range(capacity(width, rank))]
    columns = [column for each in blocks for column in each]
    assert all(len(each) == rank for each in blocks)
    assert columns == list(range(len(columns)))
    assert width - len(columns) < rank


@settings(deadline=None)
@given(a=st.text(), b=st.text(), rank=st.integers(1, 40))
def test_hashed_blocks_share_all_or_nothing(a, b, rank):
    first, second = hashed_block(a, 320, rank), hashed_block(b, 320, rank)
    assert hashed_block(a, 320, rank) == first
    assert first in [block(i, 320, rank) for i in range(capacity(320, rank))]
    assert shared_columns(first, second) in ((), first)


def test_hashed_blocks_match_stored_values_and_are_spread():
    assert hashed_block("rex", 320, 20)[0] == 60
    assert hashed_block("rex", 768, 20)[0] == 700
    assert len({hashed_block(f"concept {i}", 320, 20) for i in range(200)}) == 16


def test_shared_columns():
    assert shared_columns((4, 1, 2), (2, 3, 4)) == (2, 4)
    assert shared_columns(block(0, 64, 8), block(1, 64, 8)) == ()


def test_capacity_of_stable_diffusion_widths():
    assert [capacity(width, 20) for width in (320, 640, 768, 1280)] == [16, 32, 38, 64]


@ALL
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_down_projection(basis, scale):
    columns = block(2, 40, 5)
    down = down_projection(basis, 40, columns, 9, scale=scale)
    assert down.shape == (5, 40)
    assert down.is_contiguous()
    assert torch.equal(down, scale * basis(40, columns, 9).T)


@pytest.mark.parametrize("rank", [0, -1, 9])
def test_ranks_that_do_not_fit_the_width_are_refused(rank):
    with pytest.raises(ConfigError, match=f"rank {rank}"):
        capacity(8, rank)


@pytest.mark.parametrize("index", [-1, 16])
def test_blocks_beyond_the_capacity_are_refused(index):
    with pytest.raises(ConfigError, match="capacity for 16"):
        block(index, 320, 20)


@ALL
@pytest.mark.parametrize(
    ("width", "columns", "seed", "message"),
    [
        (0, [], 0, "width 0"),
        (8, [8], 0, r"\[8\] do not exist"),
        (8, [-1], 0, r"\[-1\] do not exist"),
        (8, [1, 1], 0, "twice"),
        (8, [1], -1, "seed -1"),
        (8, [1], 1 << 64, "64-bit"),
    ],
)
def test_invalid_arguments_are_refused(basis, width, columns, seed, message):
    with pytest.raises(ConfigError, match=message):
        basis(width, columns, seed)


def test_columns_given_twice_in_a_tensor_are_refused():
    for basis in BASES.values():
        with pytest.raises(ConfigError, match=r"\[3, 3\] contains a column twice"):
            basis(8, torch.tensor([3, 3]), 0)


@ALL
def test_a_slice_without_columns_is_empty(basis):
    assert basis(8, [], 0).shape == (8, 0)


@settings(deadline=None, max_examples=10)
@given(width=st.integers(2, 12), seed=st.integers(0, MASK))
def test_gaussian_qr_orthogonalizes_the_documented_normal_numbers(width, seed):
    """Box-Muller of the hash in plain Python, and the columns by Gram and Schmidt."""
    radii, angles = (
        [((word >> 11) + 0.5) / 2**53 for word in _words(seed, width, stream, width * width)]
        for stream in (4, 5)
    )
    normal = [
        math.sqrt(-2 * math.log(radius)) * math.cos(2 * math.pi * angle)
        for radius, angle in zip(radii, angles, strict=True)
    ]
    columns = torch.tensor(normal, dtype=torch.float64).reshape(width, width).T
    expected: list[torch.Tensor] = []
    for column in columns:
        for _ in range(2):  # once more against rounding
            for other in expected:
                column = column - (column @ other) * other
        expected.append(column / column.norm())
    found = gaussian_qr(width, range(width), seed)
    assert (found - torch.stack(expected, dim=1)).abs().max() < 1e-6

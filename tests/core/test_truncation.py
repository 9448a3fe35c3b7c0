"""Products of a given rank are as near as any can be, or nearly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from customize.core.lowrank import LowRank, from_dense, weighted_sum
from customize.core.truncation import truncate, truncate_randomized
from customize.errors import ConfigError
from tests.core.making import close, dense, updates


@settings(deadline=None)
@given(updates(), st.integers(1, 8))
def test_truncate_is_the_best_approximation(case, rank):
    products, weights = case
    p = weighted_sum(products, weights)
    cut = truncate(p, rank)
    singular = torch.linalg.svdvals(dense(p))
    best = singular[rank:].square().sum().sqrt().item()
    error = torch.linalg.matrix_norm(dense(cut) - dense(p)).item()
    assert error <= best + 1e-5 * (1 + singular[0].item())
    assert cut.rank == min(rank, p.rank, *p.shape)
    assert cut.up.dtype == p.up.dtype
    ups, downs = cut.up.double().T @ cut.up.double(), cut.down.double() @ cut.down.double().T
    assert close(ups, downs)
    assert close(ups, torch.diag(torch.linalg.svdvals(dense(p))[: cut.rank]), 1e-5)


@pytest.mark.parametrize("spectrum", ["flat", "falling", "of noise"])
def test_randomized_truncation_is_within_one_percent_of_the_optimum(spectrum):
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 120, dtype=torch.float64)).Q for n in (150, 200))
    singular = torch.ones(120, dtype=torch.float64)
    if spectrum == "falling":
        singular = 0.9 ** torch.arange(120, dtype=torch.float64)
    update = (left * singular) @ right.T
    if spectrum == "of noise":  # what pruning leaves: some directions above many small ones
        update = torch.randn(150, 200, dtype=torch.float64) + 40 * left[:, :5] @ right[:, :5].T
    cut = truncate_randomized(from_dense(update.float()), 8)
    best = torch.linalg.svdvals(update)[8:].square().sum().sqrt()
    assert cut.rank == 8 and cut.up.dtype == torch.float32
    assert best <= torch.linalg.matrix_norm(dense(cut) - update) * (1 + 1e-6)
    assert torch.linalg.matrix_norm(dense(cut) - update) <= 1.01 * best
    assert torch.equal(truncate_randomized(from_dense(update.float()), 8).up, cut.up)


def test_ranks_below_one_are_refused():
    p = LowRank(torch.ones(3, 2), torch.ones(2, 4))
    for cut in (truncate, truncate_randomized):
        with pytest.raises(ConfigError, match="rank 0"):
            cut(p, 0)


def test_results_are_in_float32_or_a_higher_precision():
    torch.manual_seed(0)
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        cut = truncate(LowRank(torch.randn(9, 4).to(dtype), torch.randn(4, 7).to(dtype)), 2)
        assert cut.up.dtype == cut.down.dtype == expected
        assert cut.scale == 1.0


def test_updates_of_less_than_twice_the_rank_are_truncated_exactly():
    torch.manual_seed(0)
    # 2 * (3 + 10) columns is not below the rank, nor below the smaller side.
    for rank, shape in ((26, (40, 50)), (40, (26, 50)), (40, (50, 26))):
        p = LowRank(torch.randn(shape[0], rank), torch.randn(rank, shape[1]))
        exact, found = truncate(p, 3), truncate_randomized(p, 3)
        assert torch.equal(found.up, exact.up) and torch.equal(found.down, exact.down)
    p = LowRank(torch.randn(40, 27), torch.randn(27, 50))
    exact, found = truncate(p, 3), truncate_randomized(p, 3)
    assert not torch.equal(found.up, exact.up)
    assert close(dense(found), dense(exact), 0.1)


def test_float64_is_kept_by_the_randomized_truncation():
    torch.manual_seed(0)
    cut = truncate_randomized(from_dense(torch.randn(60, 70).double()), 4)
    assert cut.up.dtype == cut.down.dtype == torch.float64
    for rank in (0, -1, 2.5, True, None):
        with pytest.raises(ConfigError, match="truncated to rank"):
            truncate_randomized(from_dense(torch.ones(60, 70)), rank)


@pytest.mark.parametrize("shape", [(3, 8), (8, 3)])
def test_ranks_above_the_smaller_side_keep_the_product(shape):
    torch.manual_seed(0)
    p = LowRank(torch.randn(shape[0], 5), torch.randn(5, shape[1]), 0.5)
    cut = truncate(p, 4)
    assert cut.rank == 3
    assert close(dense(cut), dense(p))

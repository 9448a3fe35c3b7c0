"""Every merge agrees with its definition on dense float64 products, whatever the factors."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft.utils.merge_utils import magnitude_prune
from peft.utils.merge_utils import ties as peft_ties

from customize.core.lowrank import LowRank, from_factors
from customize.core.merges import (
    MERGES,
    average,
    check_settings,
    dare,
    magnitude,
    mean_ratio,
    settings_of,
    subject_style,
    ties,
    truncated,
)
from customize.errors import ConceptError, ConfigError
from tests.core.making import close, dense, updates

SEED_SEVEN = [0.0, 2.0, 0.0, 0.0, 2.0, 2.0, 2.0, 0.0, 2.0, 0.0, 0.0, 0.0]
DENSITIES = st.floats(0.05, 1.0)


def size(products, weights) -> float:
    """The most that a merge's rounding may be measured against."""
    return 1 + sum(
        abs(w) * float(dense(p).abs().max()) for p, w in zip(products, weights, strict=True)
    )


def trimmed(entries: torch.Tensor, density: float) -> torch.Tensor:
    """By sorting, where the code selects."""
    kept = max(round(density * entries.numel()), 1)
    least = entries.abs().flatten().sort(descending=True).values[kept - 1]
    return entries * (entries.abs() >= least)


@settings(deadline=None)
@given(updates(dtype=torch.float64))
def test_average_divides_by_the_number_of_concepts(case):
    products, weights = case
    expected = sum(w * dense(p) for p, w in zip(products, weights, strict=True)) / len(products)
    assert close(dense(average(products, weights)), expected, 1e-12)


@settings(deadline=None)
@given(updates(), st.none() | st.integers(1, 8))
def test_truncated_is_the_best_of_its_rank(case, rank):
    products, weights = case
    expected = sum(w * dense(p) for p, w in zip(products, weights, strict=True))
    merged = truncated(products, weights, rank=rank)
    limit = rank or max(p.rank for p in products)
    best = torch.linalg.svdvals(expected)[limit:].square().sum().sqrt()
    assert merged.rank <= limit
    error = torch.linalg.matrix_norm(dense(merged) - expected)
    assert error <= best + 1e-5 * size(products, weights)


@settings(deadline=None)
@given(updates(dtype=torch.float64), DENSITIES)
def test_magnitude_sums_what_is_large(case, density):
    products, weights = case
    expected = sum(w * trimmed(dense(p), density) for p, w in zip(products, weights, strict=True))
    assume(all(w == 0 or abs(w) > 1e-3 for w in weights))  # else rounding decides what is larger
    assert close(dense(magnitude(products, weights, density=density)), expected, 1e-12)


@settings(deadline=None)
@given(updates(dtype=torch.float64), DENSITIES)
def test_ties_by_its_definition(case, density):
    products, weights = case
    assume(all(w == 0 or abs(w) > 1e-3 for w in weights))
    left = torch.stack(
        [w * trimmed(dense(p), density) for p, w in zip(products, weights, strict=True)]
    )
    expected = torch.zeros(products[0].shape, dtype=torch.float64)
    for row in range(expected.shape[0]):
        for column in range(expected.shape[1]):
            entries = left[:, row, column]
            agreeing = [e for e in entries.tolist() if e * float(entries.sum()) > 0]
            expected[row, column] = sum(agreeing) / max(len(agreeing), 1)
    # A sum that is zero but for rounding elects either sign.
    settled = (left.sum(0).abs() > 1e-9) | (left.abs().sum(0) == 0)
    found = dense(ties(products, weights, density=density))
    assert close(found * settled, expected * settled, 1e-9)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.85])
def test_peft_agrees_on_dense_updates_at_weight_one(density):
    """Its functions are right on dense updates, and give another result on factors."""
    torch.manual_seed(0)
    products = [
        LowRank(torch.randn(20, rank, dtype=torch.float64), torch.randn(rank, 25).double(), scale)
        for rank, scale in ((2, 1.0), (5, 0.5), (3, -2.0))
    ]
    ones, weights = torch.ones(3, dtype=torch.float64), [1.0] * 3
    whole = [dense(p) for p in products]
    assert close(dense(ties(products, weights, density=density)), peft_ties(whole, ones, density))
    pruned = dense(magnitude(products, weights, density=density))
    assert close(pruned, magnitude_prune(whole, ones, density))


@settings(deadline=None)
@given(updates(dtype=torch.float64), st.floats(0.3, 1.0), st.integers(0, 2**40))
def test_dare_keeps_entries_by_chance_and_rescales_them(case, density, seed):
    products, weights = case
    merged = dense(dare(products, weights, density=density, seed=seed))
    assert torch.equal(merged, dense(dare(products, weights, density=density, seed=seed)))
    # Every entry is a sum over those that stayed: with one concept, it is whole or nothing.
    alone = dense(dare(products[:1], weights[:1], density=density, seed=seed))
    whole = weights[0] * dense(products[0]) / density
    assert bool(((alone - whole).abs() <= 1e-12 * (1 + whole.abs())).logical_or(alone == 0).all())


def test_dare_is_the_sum_on_average_and_the_same_everywhere():
    torch.manual_seed(0)
    products = [LowRank(torch.randn(30, 2), torch.randn(2, 40), 0.5) for _ in range(2)]
    weights = [1.0, -0.7]
    exact = dense(MERGES["sum"](products, weights))
    found = [dense(dare(products, weights, density=0.3, seed=seed)) for seed in range(400)]
    mean = torch.stack(found).mean(0)
    assert float((mean - exact).norm() / exact.norm()) < 0.15
    kept = [float((each != 0).double().mean()) for each in found]
    assert abs(sum(kept) / len(kept) - (1 - 0.7**2)) < 0.01  # of two, one at least
    # A single product is the sum of nothing else: numbers that must not change with the machine.
    one = LowRank(torch.ones(1, 1), torch.ones(1, 12))
    stays = dense(dare([one], [1.0], density=0.5, seed=7)).flatten().tolist()
    assert stays == SEED_SEVEN
    assert dense(dare([one], [1.0], density=0.5, seed=8)).flatten().tolist() != stays


@settings(deadline=None)
@given(updates(count=2, dtype=torch.float64), st.floats(0.2, 5.0))
def test_subject_style_is_what_k_lora_chooses_on_average_over_its_steps(case, balance):
    (subject, style), weights = case
    count = subject.rank * style.rank
    largest = [
        float(dense(p).abs().flatten().sort(descending=True).values[:count].sum())
        for p in (subject, style)
    ]
    steps = 2000
    choices = []
    for step in range(steps):
        factor = 0.5 + 1.5 * (step + 0.5) / steps
        choices.append(1.0 if largest[0] > balance * largest[1] * factor else 0.0)
    share = sum(choices) / steps
    if 0 in largest:
        expected = weights[0] * dense(subject) + weights[1] * dense(style)
    else:
        expected = share * weights[0] * dense(subject) + (1 - share) * weights[1] * dense(style)
    merged = subject_style([subject, style], weights, balance=balance)
    assert (dense(merged) - expected).abs().max() <= 1e-3 * size([subject, style], weights)
    assert merged.rank <= subject.rank + style.rank


def test_the_balance_is_how_much_larger_the_subjects_entries_are():
    small, large = (
        LowRank(torch.ones(3, 1), torch.ones(1, 4)),
        LowRank(torch.ones(3, 1), torch.ones(1, 4), 5.0),
    )
    zero = LowRank(torch.ones(3, 1), torch.ones(1, 4), 0.0)
    assert mean_ratio([(large, small), (small, small), (zero, small)]) == pytest.approx(3.0)
    assert mean_ratio([]) == 1.0
    # With it, a subject of larger entries throughout is no more than a style's equal.
    assert close(dense(subject_style([large, small], [1.0, 1.0])), dense(large))
    even = dense(subject_style([large, small], [1.0, 1.0], balance=5.0))
    assert close(even, dense(large) / 3 + 2 * dense(small) / 3)


@pytest.mark.parametrize("name", ["magnitude", "dare", "ties"])
def test_pruning_is_of_the_product_and_not_of_factors(name):
    """The same update by other factors gives the same merge; also of a convolution."""
    torch.manual_seed(0)
    products = [
        from_factors(torch.randn(6, 2, 1, 1), torch.randn(2, 3, 3, 3), 0.5),
        from_factors(torch.randn(6, 4, 1, 1), torch.randn(4, 3, 3, 3), 2.0),
    ]
    turn = torch.tensor([[3.0, 1.0], [0.5, 4.0]])
    again = [
        LowRank(products[0].up @ turn, torch.linalg.inv(turn) @ products[0].down, 0.5),
        LowRank(2 * products[1].up, products[1].down),
    ]
    merged, same = (MERGES[name](each, [1.0, -0.5]) for each in (products, again))
    assert merged.shape == (6, 27) and close(dense(merged), dense(same), 1e-4)
    assert 0 < int((dense(merged) == 0).sum()) < 6 * 27


@pytest.mark.parametrize("name", MERGES)
def test_what_does_not_fit_is_refused(name):
    merge = MERGES[name]
    p, q = LowRank(torch.ones(3, 2), torch.ones(2, 4)), LowRank(torch.ones(3, 2), torch.ones(2, 5))
    with pytest.raises(ConceptError, match="nothing to merge"):
        merge([], [])
    with pytest.raises(ConceptError, match="nothing to merge"):
        merge([], [1.0])
    with pytest.raises(ConfigError, match="1 weights were given for 2"):
        merge([p, p], [1.0])
    with pytest.raises(ConfigError, match="inf"):
        merge([p], [math.inf])
    with pytest.raises(ConceptError, match="do not belong to one weight"):
        merge([p, q], [1.0, 1.0])
    if "density" in settings_of(name):
        for density in (0.0, 1.5, math.nan):
            with pytest.raises(ConfigError, match="entries cannot stay"):
                merge([p, p], [1.0, 1.0], density=density)


def test_settings_out_of_range_or_unknown_are_refused():
    p = LowRank(torch.ones(3, 2), torch.ones(2, 4))
    with pytest.raises(ConfigError, match="3 were given"):
        subject_style([p, p, p], [1.0] * 3)
    for wrong in ({"balance": 0.0}, {"start": -1.0}, {"start": 2.0, "end": 1.0}):
        with pytest.raises(ConfigError, match="choose nothing"):
            subject_style([p, p], [1.0, 1.0], **wrong)
    with pytest.raises(ConfigError, match="rank 0"):
        truncated([p, p], [1.0, 1.0], rank=0)
    check_settings("dare", {"density": 0.5, "seed": 1})
    with pytest.raises(ConfigError, match="no setting seed") as caught:
        check_settings("ties", {"seed": 1})
    assert "density" in str(caught.value)
    for name, value in (("density", "0.5"), ("seed", 0.5), ("density", True)):
        with pytest.raises(ConfigError, match=f"cannot have a {name}"):
            check_settings("dare", {name: value})
    with pytest.raises(ConfigError, match="no setting density"):
        check_settings("fusion", {"density": 0.5})

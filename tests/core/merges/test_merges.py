"""Every merge agrees with its definition on dense float64 updates, whatever the factors."""

import inspect
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft.utils.merge_utils import magnitude_prune
from peft.utils.merge_utils import ties as peft_ties

from customize.core.lowrank import LowRank, from_factors
from customize.core.merges import MERGES
from customize.core.merges.average import average
from customize.core.merges.dare import dare
from customize.core.merges.magnitude import magnitude
from customize.core.merges.method import RecordedInputs
from customize.core.merges.ties import ties
from customize.core.merges.truncate import truncated_sum
from customize.errors import ConceptError, ConfigError
from tests.core.making import close, dense
from tests.core.making import updates as random_updates

SEED_SEVEN = [0.0, 2.0, 0.0, 0.0, 2.0, 2.0, 2.0, 0.0, 2.0, 0.0, 0.0, 0.0]
DENSITIES = st.floats(0.05, 1.0)


def magnitude_bound(products, weights) -> float:
    """An upper bound of the entries, for tolerances."""
    return 1 + sum(
        abs(w) * float(dense(p).abs().max()) for p, w in zip(products, weights, strict=True)
    )


def trimmed(entries: torch.Tensor, density: float) -> torch.Tensor:
    """The largest entries by sorting, where the package selects."""
    count = max(round(density * entries.numel()), 1)
    threshold = entries.abs().flatten().sort(descending=True).values[count - 1]
    return entries * (entries.abs() >= threshold)


@settings(deadline=None)
@given(random_updates(dtype=torch.float64))
def test_average_divides_by_the_number_of_concepts(case):
    products, weights = case
    expected = sum(w * dense(p) for p, w in zip(products, weights, strict=True)) / len(products)
    assert close(dense(average(products, weights)), expected, 1e-12)


@settings(deadline=None)
@given(random_updates(), st.none() | st.integers(1, 8))
def test_truncated_sum_is_the_best_of_its_rank(case, rank):
    products, weights = case
    expected = sum(w * dense(p) for p, w in zip(products, weights, strict=True))
    merged = truncated_sum(products, weights, rank=rank)
    limit = rank or max(p.rank for p in products)
    best = torch.linalg.svdvals(expected)[limit:].square().sum().sqrt()
    assert merged.rank <= limit
    error = torch.linalg.matrix_norm(dense(merged) - expected)
    assert error <= best + 1e-5 * magnitude_bound(products, weights)


@settings(deadline=None)
@given(random_updates(dtype=torch.float64), DENSITIES)
def test_magnitude_sums_the_largest_entries(case, density):
    products, weights = case
    expected = sum(w * trimmed(dense(p), density) for p, w in zip(products, weights, strict=True))
    assume(all(w == 0 or abs(w) > 1e-3 for w in weights))  # else rounding decides what is larger
    assert close(dense(magnitude(products, weights, density=density)), expected, 1e-12)


@settings(deadline=None)
@given(random_updates(dtype=torch.float64), DENSITIES)
def test_ties_agrees_with_its_definition(case, density):
    products, weights = case
    assume(all(w == 0 or abs(w) > 1e-3 for w in weights))
    pruned = torch.stack(
        [w * trimmed(dense(p), density) for p, w in zip(products, weights, strict=True)]
    )
    expected = torch.zeros(products[0].shape, dtype=torch.float64)
    for row in range(expected.shape[0]):
        for column in range(expected.shape[1]):
            entries = pruned[:, row, column]
            agreeing = [e for e in entries.tolist() if e * float(entries.sum()) > 0]
            expected[row, column] = sum(agreeing) / max(len(agreeing), 1)
    # A sum that is zero but for rounding elects either sign.
    is_settled = (pruned.sum(0).abs() > 1e-9) | (pruned.abs().sum(0) == 0)
    merged = dense(ties(products, weights, density=density))
    assert close(merged * is_settled, expected * is_settled, 1e-9)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.85])
def test_pruning_agrees_with_peft_on_dense_updates(density):
    """peft's functions are exact on dense updates, and differ on factors."""
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
@given(random_updates(dtype=torch.float64), st.floats(0.3, 1.0), st.integers(0, 2**40))
def test_dare_keeps_random_entries_and_rescales_them(case, density, seed):
    products, weights = case
    merged = dense(dare(products, weights, density=density, seed=seed))
    assert torch.equal(merged, dense(dare(products, weights, density=density, seed=seed)))
    # With one concept, an entry is either rescaled or zero.
    alone = dense(dare(products[:1], weights[:1], density=density, seed=seed))
    whole = weights[0] * dense(products[0]) / density
    assert bool(((alone - whole).abs() <= 1e-12 * (1 + whole.abs())).logical_or(alone == 0).all())


def test_dare_has_the_sum_as_mean_and_is_reproducible():
    torch.manual_seed(0)
    products = [LowRank(torch.randn(30, 2), torch.randn(2, 40), 0.5) for _ in range(2)]
    weights = [1.0, -0.7]
    exact = dense(MERGES["sum"].merge(products, weights))
    samples = [dense(dare(products, weights, density=0.3, seed=seed)) for seed in range(400)]
    mean = torch.stack(samples).mean(0)
    assert float((mean - exact).norm() / exact.norm()) < 0.15
    density = [float((sample != 0).double().mean()) for sample in samples]
    assert abs(sum(density) / len(density) - (1 - 0.7**2)) < 0.01  # at least one of two is kept
    # The mask must not depend on the machine.
    one = LowRank(torch.ones(1, 1), torch.ones(1, 12))
    kept = dense(dare([one], [1.0], density=0.5, seed=7)).flatten().tolist()
    assert kept == SEED_SEVEN
    assert dense(dare([one], [1.0], density=0.5, seed=8)).flatten().tolist() != kept


@pytest.mark.parametrize("name", ["magnitude", "dare", "ties"])
def test_pruning_depends_on_the_product_not_on_its_factors(name):
    """Other factors of the same update give the same merge, also for a convolution."""
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
    merged, same = (MERGES[name].merge(updates, [1.0, -0.5]) for updates in (products, again))
    assert merged.shape == (6, 27) and close(dense(merged), dense(same), 1e-4)
    assert 0 < int((dense(merged) == 0).sum()) < 6 * 27


@pytest.mark.parametrize("name", MERGES)
def test_updates_and_weights_that_do_not_match_are_refused(name):
    method = MERGES[name]

    def merge(updates, weights, **settings):
        inputs = [RecordedInputs([torch.eye(4)] * len(updates))] if method.needs_inputs else []
        return method.merge(updates, weights, *inputs, **settings)

    p, q = LowRank(torch.ones(3, 2), torch.ones(2, 4)), LowRank(torch.ones(3, 2), torch.ones(2, 5))
    with pytest.raises(ConceptError, match="nothing to merge"):
        merge([], [])
    with pytest.raises(ConceptError, match="nothing to merge"):
        merge([], [1.0])
    with pytest.raises(ConfigError, match="1 weight for 2"):
        merge([p, p], [1.0])
    with pytest.raises(ConfigError, match="inf"):
        merge([p], [math.inf])
    with pytest.raises(ConceptError, match="do not belong to one weight"):
        merge([p, q], [1.0, 1.0])
    if "density" in method.defaults:
        for density in (0.0, 1.5, math.nan):
            with pytest.raises(ConfigError, match="invalid density"):
                merge([p, p], [1.0, 1.0], density=density)


def test_settings_are_checked_against_their_declaration():
    p = LowRank(torch.ones(3, 2), torch.ones(2, 4))
    with pytest.raises(ConfigError, match="rank 0"):
        truncated_sum([p, p], [1.0, 1.0], rank=0)
    MERGES["dare"].check_settings({"density": 0.5, "seed": 1})
    with pytest.raises(ConfigError, match="no setting seed") as caught:
        MERGES["ties"].check_settings({"seed": 1})
    assert "density" in str(caught.value)
    for name, value in (("density", "0.5"), ("seed", 0.5), ("density", True)):
        with pytest.raises(ConfigError, match=f"invalid {name} .*not a"):
            MERGES["dare"].check_settings({name: value})
    for name, value in (("density", 0.0), ("density", 1.5)):
        with pytest.raises(ConfigError, match=f"invalid {name} .*out of range") as caught:
            MERGES["dare"].check_settings({name: value})
        assert "from 1e-06 to 1" in str(caught.value)
    with pytest.raises(ConfigError, match="out of range") as caught:
        MERGES["truncate"].check_settings({"rank": 0})
    assert "an integer of at least 1" in str(caught.value)
    with pytest.raises(ConfigError, match="no setting density"):
        MERGES["fusion"].check_settings({"density": 0.5})


@pytest.mark.parametrize("method", MERGES.values(), ids=MERGES)
def test_declared_settings_are_the_keyword_arguments_of_the_function(method):
    parameters = inspect.signature(method.merge).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert method.defaults == keywords
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert len(positional) == 2 + method.needs_inputs
    for setting in method.settings:
        if setting.default is not None:
            setting.check(setting.default, method.name)


def test_a_sum_of_updates_of_rank_one_is_truncated_to_rank_one():
    torch.manual_seed(0)
    products = [LowRank(torch.randn(6, 1), torch.randn(1, 5)) for _ in range(3)]
    assert truncated_sum(products, [1.0, 1.0, 1.0]).rank == 1


@pytest.mark.parametrize("name", ["magnitude", "dare", "ties"])
def test_errors_of_settings_name_the_merge(name):
    p = LowRank(torch.ones(3, 2), torch.ones(2, 4))
    with pytest.raises(ConfigError, match=f"of the merge {name}: out of range"):
        MERGES[name].merge([p, p], [1.0, 1.0], density=2.0)
    with pytest.raises(ConfigError, match=f"of the merge {name}: not a number"):
        MERGES[name].check_settings({"density": None})


def test_ranges_of_settings_contain_their_ends():
    for name in ("magnitude", "dare", "ties"):
        for density in (1e-6, 1.0, 1):
            MERGES[name].check_settings({"density": density})
    MERGES["truncate"].check_settings({"rank": 1})
    for seed in (-(2**63), -1000, 2**63 - 1):
        MERGES["dare"].check_settings({"seed": seed})
    for seed in (-(2**63) - 1, 2**63):
        with pytest.raises(ConfigError, match="of the merge dare: not an integer"):
            MERGES["dare"].check_settings({"seed": seed})


def test_pruning_keeps_at_least_one_entry():
    torch.manual_seed(0)
    entries = torch.randn(5, 6)
    p = LowRank(torch.eye(5), entries)
    for name in ("magnitude", "ties"):
        merged = dense(MERGES[name].merge([p], [1.0], density=1e-6))
        expected = entries * (entries.abs() == entries.abs().max())
        assert torch.equal(merged.float(), expected)


@pytest.mark.parametrize("name", ["magnitude", "dare", "ties"])
def test_pruned_updates_of_half_precision_are_computed_in_float32(name):
    """Of one update and density 1, all that pruning methods do is to multiply by the weight."""
    torch.manual_seed(0)
    up, down = torch.randn(6, 2), torch.randn(2, 5)
    for p in (
        LowRank(up.bfloat16(), down.bfloat16(), 1 / 3),
        LowRank(up.bfloat16(), down, 1 / 3),
        LowRank(up, down.bfloat16(), 1 / 3),
    ):
        merged = MERGES[name].merge([p], [0.7], density=1.0)
        assert merged.up.dtype == merged.down.dtype == torch.float32
        assert close(dense(merged), 0.7 * dense(p), 1e-6)

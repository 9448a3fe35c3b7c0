"""Preservation losses against plain computations, and what holds for all inputs."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from customize.core.preservation import PRESERVATIONS, select_losses
from customize.core.preservation.class_text import class_text
from customize.core.preservation.context_text import context_text
from customize.core.preservation.distances import check_shapes, cosine_distance
from customize.core.preservation.output import output
from customize.core.preservation.positions import normalize_rows
from customize.errors import TrainingError

SHAPES = {
    "class_text": (3, 8),
    "context_text": (3, 5, 8),
    "output": (3, 4, 6, 6),
    "context_output": (3, 4, 6, 6),
}
NAMES = pytest.mark.parametrize("name", PRESERVATIONS)
SEEDS = st.integers(0, 2**32 - 1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_registry_has_every_loss():
    assert SHAPES.keys() == PRESERVATIONS.keys()


@NAMES
def test_loss_is_zero_for_equal_inputs_only(name):
    learned, base = normal(*SHAPES[name]), normal(*SHAPES[name], seed=1)
    loss = PRESERVATIONS[name]
    assert loss(learned, learned.clone(), None).abs() < 1e-6
    assert loss(learned, base, None) > 0.1
    assert loss(learned, base, None).shape == ()


@NAMES
@given(seed=SEEDS)
def test_gradient_step_reduces_loss(name, seed):
    learned = normal(*SHAPES[name], seed=seed).requires_grad_()
    base = normal(*SHAPES[name], seed=seed + 1)
    before = PRESERVATIONS[name](learned, base, None)
    before.backward()
    with torch.no_grad():
        after = PRESERVATIONS[name](learned - 1e-2 * learned.grad, base, None)
    assert after < before
    assert base.grad is None


@NAMES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    learned, base = normal(*SHAPES[name]).to(dtype), normal(*SHAPES[name], seed=1).to(dtype)
    found = PRESERVATIONS[name](learned, base, None)
    assert found.dtype == torch.float32
    assert found == PRESERVATIONS[name](learned.float(), base.float(), None)


@NAMES
def test_different_shapes_are_refused(name):
    shape = SHAPES[name]
    for other in ((shape[0] + 1, *shape[1:]), shape[1:], (*shape, 1)):
        with pytest.raises(TrainingError):
            PRESERVATIONS[name](normal(*shape), normal(*other), None)
    with pytest.raises(TrainingError):
        PRESERVATIONS[name](normal(*shape), normal(*shape), normal(shape[0] + 1))


@given(seed=SEEDS, scale=st.floats(0.01, 100))
def test_cosine_distance_depends_on_angles_only(seed, scale):
    a, b = normal(4, 8, seed=seed), normal(4, 8, seed=seed + 1)
    found = cosine_distance(a, b)
    plain = [
        1 - float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)) for x, y in zip(a, b, strict=True)
    ]
    assert torch.allclose(found, torch.tensor(plain), atol=1e-5)
    assert torch.allclose(cosine_distance(scale * a, b), found, atol=1e-5)
    assert torch.allclose(cosine_distance(b, a), found, atol=1e-6)
    assert bool((found >= -1e-6).all()) and bool((found <= 2 + 1e-6).all())
    assert torch.allclose(cosine_distance(a, -a), torch.full((4,), 2.0))


def test_weights_are_factors():
    a, b = normal(3, 8), normal(3, 8, seed=1)
    weight = torch.tensor([2.0, 0.0, 1.0])
    assert torch.isclose(class_text(a, b, weight), (cosine_distance(a, b) * weight).mean())
    a, b = normal(3, 4, 6, 6), normal(3, 4, 6, 6, seed=1)
    plain = ((a - b) ** 2).mean((1, 2, 3))
    assert torch.isclose(output(a, b, weight), (plain * weight).mean())
    assert torch.isclose(output(a, b), plain.mean())


@given(seed=SEEDS, lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_context_text_averages_over_the_positions_of_each_prompt(seed, lengths):
    """However long the others are, and whatever fills the shorter ones up."""
    longest = max(lengths)
    a = normal(len(lengths), longest, 8, seed=seed)
    b = normal(len(lengths), longest, 8, seed=seed + 1)
    counts = torch.tensor([[place < n for place in range(longest)] for n in lengths])
    weight = normalize_rows(counts)
    assert torch.allclose(weight.sum(1), torch.ones(len(lengths)))
    alone = [cosine_distance(x[:n], y[:n]).mean() for x, y, n in zip(a, b, lengths, strict=True)]
    found = context_text(a, b, weight)
    assert torch.isclose(found, torch.stack(alone).mean(), atol=1e-6)
    filled = torch.where(counts[..., None], a, torch.full_like(a, 7.0))
    assert torch.isclose(context_text(filled, b, weight), found, atol=1e-6)


def test_losses_are_selected_by_what_they_compare() -> None:
    assert select_losses(PRESERVATIONS, "phrase_feature") == ["class_text"]
    assert select_losses(["output", "context_text"], "context_features", "class_prediction") == [
        "context_text",
        "output",
    ]


def test_registry_does_not_import_torch() -> None:
    code = "import sys, customize.core.preservation; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_shapes_of_features_that_do_not_match_are_named():
    with pytest.raises(TrainingError, match=r"shapes \(2, 4\) and \(3, 4\) cannot be compared"):
        check_shapes(torch.zeros(2, 4), torch.zeros(3, 4), None, 1)

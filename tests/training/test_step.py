"""Gradients, their norm and learning rates of an optimizer step."""

import pytest
import torch

from customize.training.loop import learning_rate_factor
from customize.training.recipe import train
from tests.tiny import tiny_sd
from tests.training.runs import settings

STILL = {"learning_rate": 1e-12, "text_learning_rate": 1e-12, "token_learning_rate": 1e-12}


@pytest.fixture
def taken(monkeypatch):
    """Collect (gradients, learning rates by name) of each step."""
    steps = []
    step = torch.optim.AdamW.step

    def recorded(self, *args, **kwargs):
        parameters = [p for group in self.param_groups for p in group["params"]]
        rates = {group["name"]: group["lr"] for group in self.param_groups}
        steps.append(([p.grad.clone() for p in parameters], rates))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    return steps


def norm(gradients):
    return torch.stack([g.norm() for g in gradients]).norm().item()


def run(folder, name, **changes):
    losses = []
    config = settings(folder, name, **changes)
    train(
        config,
        tiny_sd().components,
        progress=False,
        on_step=lambda _, loss: losses.append(float(loss)),
    )
    return losses


def test_an_accumulated_gradient_is_the_mean_of_its_batches(taken, tmp_path):
    """Two batches of one step equal those of two steps with tiny learning rates."""
    apart = run(tmp_path, "apart", steps=2, max_grad_norm=0, **STILL)
    together = run(tmp_path, "together", steps=1, gradient_accumulation=2, max_grad_norm=0, **STILL)
    assert together[0] == pytest.approx(sum(apart) / 2, rel=1e-5)
    (first, _), (second, _), (both, _) = taken
    assert norm(first) > 0 and norm(second) > 0
    for a, b, mean in zip(first, second, both, strict=True):
        assert torch.allclose((a + b) / 2, mean, rtol=1e-3, atol=1e-6)


def test_gradients_are_clipped_together(taken, tmp_path):
    run(tmp_path, "free", steps=1, max_grad_norm=0)
    run(tmp_path, "clipped", steps=1, max_grad_norm=1e-3)
    (free, _), (clipped, _) = taken
    assert norm(free) > 1e-2
    assert norm(clipped) == pytest.approx(1e-3, rel=1e-2)
    assert torch.allclose(clipped[0], free[0] * 1e-3 / norm(free), rtol=1e-2)


def test_parameter_groups_follow_the_schedule_at_their_rates(taken, tmp_path):
    rates = {"learning_rate": 3e-3, "text_learning_rate": 2e-4, "token_learning_rate": 1e-2}
    run(tmp_path, "out", steps=6, warmup_steps=2, lr_schedule="cosine", **rates)
    for step, (_, step_rates) in enumerate(taken):
        share = learning_rate_factor(step, 6, 2, "cosine")
        assert step_rates == pytest.approx({name: rate * share for name, rate in rates.items()})
    assert taken[0][1]["learning_rate"] == pytest.approx(1.5e-3)
    assert taken[-1][1]["learning_rate"] < 1e-3


def test_the_loss_of_class_images_is_weighted(taken, tmp_path):
    losses = {}
    for weight in (0.5, 1.0, 2.0):
        losses[weight] = run(
            tmp_path, f"w{weight}", steps=1, prior_weight=weight, prior_count=2, validation_steps=1
        )[0]
    assert losses[1.0] > losses[0.5] > 0
    assert losses[2.0] - losses[1.0] == pytest.approx(2 * (losses[1.0] - losses[0.5]), rel=1e-3)

"""The optimizer of the from-scratch trainings: state, moving average, schedule."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from scripts.storybook_training.muon_adamw import EMA, Muon, MuonAdamW, orthogonalize, trapezoid


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "conv_in": nn.Conv2d(3, 6, 3),
            "hidden": nn.Conv2d(6, 8, 3),
            "last": nn.Linear(8, 4),
        }
    )


def forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    features = module["hidden"](module["conv_in"](x).relu()).mean((2, 3))
    return module["last"](features)


def take_steps(module: nn.Module, optimizer: MuonAdamW, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        forward(module, x).square().mean().backward()
        optimizer.step(1 / (step + 1))


def test_hidden_matrices_go_to_muon_and_the_rest_to_adamw():
    module = net()
    optimizer = MuonAdamW({"net": module}, 1e-2)
    assert [id(p) for p in optimizer.matrices] == [
        id(module["hidden"].weight),
        id(module["last"].weight),
    ]
    assert len(optimizer.parameters) == len(list(module.parameters()))
    # The views share the convolutions' memory: a step on one is a step on the other.
    assert optimizer.views[0].shape == (8, 54)
    assert optimizer.views[0].data_ptr() == module["hidden"].weight.data_ptr()


@pytest.mark.parametrize("shape", [(8, 54), (54, 8), (16, 16)])
def test_singular_values_become_about_one(shape: tuple[int, int]):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(matrix, steps=6)
    values = torch.linalg.svdvals(result)
    assert result.dtype == torch.float32
    assert values.min() > 0.6 and values.max() < 1.3
    # The singular vectors stay.
    diagonal = (left.T @ result @ right.T).diagonal()
    assert torch.allclose(left @ diagonal.diag() @ right, result, atol=1e-4)


def test_muon_is_torchs_up_to_its_bfloat16():
    matrices = [nn.Parameter(torch.randn(6, 10, generator=generator(0))) for _ in range(2)]
    ours = Muon(matrices[:1], lr=0.1, weight_decay=0.2)
    theirs = torch.optim.Muon(
        matrices[1:], lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw", ns_steps=4
    )
    first = matrices[0].detach().clone()
    for step in range(1, 6):
        for matrix in matrices:
            matrix.grad = torch.randn(6, 10, generator=generator(step))
        ours.step()
        theirs.step()
    assert (matrices[0] - first).norm() > 0.5
    assert torch.allclose(matrices[0], matrices[1], atol=0.02)


def test_every_parameter_moves():
    module = net()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    take_steps(module, MuonAdamW({"net": module}, 1e-2), 0, 1)
    assert all(not torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_a_restored_state_continues_as_uninterrupted():
    straight = net()
    take_steps(straight, MuonAdamW({"net": straight}, 1e-2), 0, 6)

    first = net()
    optimizer = MuonAdamW({"net": first}, 1e-2)
    take_steps(first, optimizer, 0, 3)
    state = {name: value.clone() for name, value in optimizer.state_tensors().items()}
    assert {name.split(".")[0] for name in state} == {"muon", "adamw"}

    second = net()
    second.load_state_dict(first.state_dict())
    optimizer = MuonAdamW({"net": second}, 1e-2)
    optimizer.load_state_tensors(state)
    take_steps(second, optimizer, 3, 6)
    for name, value in straight.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_gradients_are_clipped_to_norm_one():
    module = net()
    optimizer = MuonAdamW({"net": module}, 1e-2)
    (1000 * forward(module, torch.ones(1, 3, 8, 8)).sum()).backward()
    norm = optimizer.step(1.0)
    assert norm > 1
    left = torch.stack([p.grad.norm() for p in optimizer.parameters]).norm()
    assert left.item() == pytest.approx(1, rel=1e-4)


def test_the_average_swaps_with_the_weights():
    parameter = nn.Parameter(torch.zeros(3))
    ema = EMA([parameter], decay=0.9)
    for step in range(5):
        with torch.no_grad():
            parameter += 1
        ema.update(step)
    assert (ema.average[0] > 0).all()
    assert (ema.average[0] < 5).all()
    average = ema.average[0].clone()
    ema.swap()
    assert torch.equal(parameter, average)
    ema.swap()
    assert torch.equal(parameter.detach(), torch.full((3,), 5.0))
    assert torch.equal(ema.average[0], average)


def test_early_averages_forget_the_initial_weights():
    parameter = nn.Parameter(torch.full((1,), 100.0))
    ema = EMA([parameter], decay=0.9985)
    with torch.no_grad():
        parameter.zero_()
    for step in range(60):
        ema.update(step)
    assert ema.average[0].item() < 0.1


def test_the_schedule_is_a_trapezoid():
    factors = [trapezoid(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 50)
    assert factors[49:750] == [1.0] * 701
    assert all(a > b for a, b in pairwise(factors[750:981]))
    assert factors[-1] == pytest.approx(0.02)

"""Communication of training processes, in one process, in which accelerate has no effect."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from customize.training.distributed import average_gradients


def test_parameters_without_a_gradient_are_not_updated() -> None:
    first, second = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = torch.optim.AdamW([first, second], lr=0.1, weight_decay=0.1)
    accelerator = Accelerator(cpu=True)

    (first.sum() + second.sum()).backward()
    average_gradients(accelerator, [first, second])
    assert torch.equal(second.grad, torch.ones(3))
    optimizer.step()
    optimizer.zero_grad()

    before = first.detach().clone(), second.detach().clone()
    (2 * first).sum().backward()
    average_gradients(accelerator, [first, second])
    assert torch.equal(first.grad, torch.full((3,), 2.0))
    assert second.grad is None
    optimizer.step()
    assert not torch.equal(first, before[0])
    assert torch.equal(second, before[1])

"""Models on the meta device."""

from __future__ import annotations

import torch
from torch import nn

from customize.families.meta_models import on_meta_device


def make() -> nn.Module:
    layers = [nn.Linear(2, 3), nn.Conv2d(1, 2, 3), nn.Embedding(4, 2), nn.LayerNorm(3)]
    return nn.Sequential(*layers).half()


def shapes(model: nn.Module) -> dict[str, tuple[object, ...]]:
    return {
        name: (value.shape, value.dtype, value.requires_grad)
        for name, value in model.state_dict(keep_vars=True).items()
    }


def test_models_have_the_same_shapes_and_no_weights() -> None:
    with on_meta_device():
        made = make()
    assert shapes(made) == shapes(make())
    assert all(value.is_meta for value in made.state_dict().values())


def test_initialization_works_again_afterwards() -> None:
    with on_meta_device():
        make()
    weight = torch.zeros(2, 2)
    assert nn.init.ones_(weight).sum() == 4 and nn.init.normal_(weight).unique().numel() == 4
    assert not make().state_dict()["0.weight"].is_meta

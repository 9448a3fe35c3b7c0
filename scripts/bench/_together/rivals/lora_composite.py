"""LoRA Composite (Multi-LoRA Composition, arXiv:2402.16843, section 3.3).

At each step the guided predictions with each LoRA alone are averaged. They are linear in what the
denoiser computes, so its outputs are averaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from _together.drawing import draw as draw_plain
from _together.gates import LoraGates

# The weight of each LoRA; the paper's is 1. The best of `together.py --tune`, on other concepts,
# seeds and places.
STRENGTH = 1.4


def draw(pipe: Any, *scene: Any, strength: float = STRENGTH) -> Tensor:
    gates = LoraGates(pipe)
    with gates.attach(), _averaged(pipe.unet, gates, strength):
        return draw_plain(pipe, *scene)


@contextmanager
def _averaged(denoiser: Any, gates: LoraGates, strength: float = 1.0) -> Iterator[None]:
    loras = range(len(gates.owners))
    is_inner = False

    def average(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        nonlocal is_inner
        if is_inner:
            return None
        outputs = [output[0]]  # of the first LoRA
        is_inner = True
        try:
            for index in loras[1:]:
                gates.open_only(index, strength=strength)
                outputs.append(module(*args, **kwargs)[0])
        finally:
            is_inner = False
            gates.open_only(0, strength=strength)
        return (torch.stack(outputs).mean(0),)

    gates.open_only(0, strength=strength)
    handle = denoiser.register_forward_hook(average, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()

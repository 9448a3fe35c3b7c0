"""LoRA Switch (Multi-LoRA Composition, arXiv:2402.16843, section 3.2).

One LoRA is active at each step, and they take turns: at step t the one of index
floor(((t - 1) mod (k tau)) / tau). The first is that of the thing that the prompt names first.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from _together.drawing import draw as draw_plain
from _together.gates import LoraGates

# Steps of a turn of 25 (the paper's are 5 of 100 steps or more), and the weight of each LoRA (the
# paper's is 1). The best of `together.py --tune`, on other concepts, seeds and places.
TURN, STRENGTH = 1, 1.4


def draw(
    pipe: Any, things: Any, *scene: Any, turn: int = TURN, strength: float = STRENGTH
) -> Tensor:
    gates = LoraGates(pipe)
    order = [gates.owners[thing] for thing in things if thing in gates.owners]
    order += [index for index in gates.owners.values() if index not in order]
    step = 0

    def next_step(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal step
        gates.open_only(order[step % (len(order) * turn) // turn], strength=strength)
        step += 1

    handle = pipe.unet.register_forward_pre_hook(next_step, with_kwargs=True)
    try:
        with gates.attach():
            return draw_plain(pipe, things, *scene)
    finally:
        handle.remove()

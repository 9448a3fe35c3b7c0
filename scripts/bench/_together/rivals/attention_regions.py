"""Mix-of-Show's regions (arXiv:2305.18292, section 3.3): boxes in cross-attention alone.

Each cross-attention layer attends to the prompt of each region, and the outputs are blended by the
boxes; all else is shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from _together.drawing import boxes
from _together.drawing import draw as draw_plain
from _together.gates import latent_grid
from customize.concepts.tokens.prompt_phrases import regional_prompts
from customize.core.region_weights import blend, box_weights, stack_regions
from customize.core.routing import grid_of_tokens
from customize.families import family_of


def draw(
    pipe: Any, things: Sequence[str], prompts: Sequence[str], numbers: Any, size: tuple[int, int]
) -> Tensor:
    family = family_of(pipe.components)
    latents = latent_grid(family, size)
    # By region, then by picture.
    texts = [
        text
        for each in zip(*(regional_prompts(p, things) for p in prompts), strict=True)
        for text in each
    ]
    with torch.no_grad():
        conditions = family.encode_prompts(texts)["prompt_embeds"].split(len(prompts))
    is_inner = False

    def compose(module: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        nonlocal is_inner
        if is_inner:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        empty, asked = output.chunk(2)
        grid = grid_of_tokens(hidden.shape[1], *latents)
        assert grid is not None
        weights = stack_regions([box_weights(box, *grid) for box in boxes(things).values()])
        is_inner = True
        try:
            answers = [
                module(hidden[len(empty) :], encoder_hidden_states=condition)
                for condition in conditions
            ]
        finally:
            is_inner = False
        asked = blend(answers, [weight.reshape(1, -1, 1) for weight in weights])
        return torch.cat([empty, asked])

    layers = [pipe.unet.get_submodule(name) for name in family.cross_attention_layers()]
    handles = [layer.register_forward_hook(compose, with_kwargs=True) for layer in layers]
    try:
        return draw_plain(pipe, things, prompts, numbers, size)
    finally:
        for handle in handles:
            handle.remove()

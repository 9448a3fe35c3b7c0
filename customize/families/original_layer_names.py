"""How the files of those who made a model name its layers, where diffusers names them otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class RowRange:
    """Rows ``start:stop`` of a layer's weight."""

    module: str
    start: int
    stop: int


def original_rows(
    layers: Mapping[str, tuple[int, int]],
    templates: Mapping[str, Sequence[str]],
    is_swapped: Callable[[str, tuple[int, int]], bool] = lambda module, shape: False,
) -> dict[str, tuple[RowRange, ...]]:
    """:meth:`Family.original_names` from names with ``{}`` for the number of a block.

    Args:
        layers: the model's own, name -> (out, in).
        templates: original name -> the model's; those that it lacks are left out.
        is_swapped: whether the two halves of a layer's rows are in the other order there.
    """
    found = {}
    numbers = sorted({int(n) for name in layers for n in re.findall(r"\.(\d+)\.", f".{name}.")})
    for original, modules in templates.items():
        for number in numbers if "{}" in original else [0]:
            ours = [module.format(number) for module in modules]
            if not all(module in layers for module in ours):
                continue
            rows = []
            for module in ours:
                out, half = layers[module][0], layers[module][0] // 2
                if is_swapped(module, layers[module]):
                    rows += [RowRange(module, half, out), RowRange(module, 0, half)]
                else:
                    rows.append(RowRange(module, 0, out))
            found[original.format(number)] = tuple(rows)
    return found


def clip_text_model(width: int, layers: int, projected: bool = False) -> nn.Module:
    """A CLIP text encoder of one of the published sizes, with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        projection_dim=width,
    )
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)

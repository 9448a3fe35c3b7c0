"""Mapping between the original layer names of a model and those of diffusers."""

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
    """Compute :meth:`Family.original_names` from names with ``{}`` for the index of a block.

    Args:
        layers: Name -> (out, in) of the model's layers.
        templates: Original name -> names in diffusers; layers that the model lacks are skipped.
        is_swapped: Whether the original has the two halves of a layer's rows in reverse order.
    """
    ranges = {}
    numbers = sorted({int(n) for name in layers for n in re.findall(r"\.(\d+)\.", f".{name}.")})
    for original, modules in templates.items():
        for number in numbers if "{}" in original else [0]:
            names = [module.format(number) for module in modules]
            if not all(name in layers for name in names):
                continue
            rows = []
            for module in names:
                out, half = layers[module][0], layers[module][0] // 2
                if is_swapped(module, layers[module]):
                    rows += [RowRange(module, half, out), RowRange(module, 0, half)]
                else:
                    rows.append(RowRange(module, 0, out))
            ranges[original.format(number)] = tuple(rows)
    return ranges


def clip_text_model(width: int, layers: int, projected: bool = False) -> nn.Module:
    """Create a CLIP text encoder of one of the published sizes, with random weights.

    Args:
        width: Of the hidden states.
        layers: Number of layers.
        projected: Whether the encoder has a text projection.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        projection_dim=width,
    )
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)

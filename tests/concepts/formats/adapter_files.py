"""Adapter files in the formats of other programs, for tiny pipelines.

The functions return the tensors of a file and the expected updates, computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from customize.concepts.adapter import saved_module_name
from customize.concepts.types import Lora
from customize.core.lowrank import LowRank
from customize.families.family import Family

Tensors = dict[str, Tensor]
#: (component, module as files name it) -> (out, in), float64
Deltas = dict[tuple[str, str], Tensor]


def select_layers(family: Family, component: str, every: int = 1) -> dict[str, tuple[int, ...]]:
    """Every n-th layer with the shape of its weight; attention and convolutions are included."""
    shapes = family.weight_shapes(component)
    return {name: shape for n, (name, shape) in enumerate(shapes.items()) if n % every == 0}


def random_factors(
    shape: tuple[int, ...], rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random factors (up, down) in the shapes that trainers write."""
    out, channels, *kernel = shape
    up = 0.3 * torch.randn(out, rank, *[1] * len(kernel), generator=generator)
    return up, 0.3 * torch.randn(rank, channels, *kernel, generator=generator)


def dense_product(up: Tensor, down: Tensor, scale: float = 1.0) -> Tensor:
    return scale * (up.double().flatten(1) @ down.double().flatten(1))


def lora_tensors(
    family: Family,
    name: Callable[[str, str], str],
    ends: tuple[str, str] = ("lora_down.weight", "lora_up.weight"),
    *,
    every: int = 1,
    alphas: Literal["some", "none"] | float = "some",
    components: list[str] | None = None,
    seed: int = 0,
) -> tuple[Tensors, Deltas]:
    """A LoRA of ranks 1 to 3 on many layers.

    Args:
        family: The model.
        name: (component, module) -> layer name in the file.
        ends: Suffixes of the keys of down- and up-projections.
        every: Interval of the selected layers.
        alphas: Different alphas for some layers, no alphas, or one alpha for all layers.
        components: Components to change; None for the denoiser and all text encoders.
        seed: Seed of the factors.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    deltas: Deltas = {}
    for component in components or [family.denoiser_key, *family.text_encoders]:
        for number, (module, shape) in enumerate(select_layers(family, component, every).items()):
            rank = 1 + number % 3
            up, down = random_factors(shape, rank, generator)
            path = name(component, saved_module_name(component, module))
            tensors[path + ends[0]] = down
            tensors[path + ends[1]] = up
            alpha = float(rank)
            if alphas != "none" and (alphas != "some" or number % 4):
                alpha = 0.25 * (1 + number % 5) if alphas == "some" else alphas
                tensors[f"{path}.alpha"] = torch.tensor(alpha)
            deltas[component, saved_module_name(component, module)] = dense_product(
                up, down, alpha / rank
            )
    return tensors, deltas


def kohya_names(family: Family) -> Callable[[str, str], str]:
    """The kohya names of layers that are module names with underscores for dots."""

    def name(component: str, module: str) -> str:
        clips = list(family.clip_encoders)
        prefix = "lora_unet"
        if component != family.denoiser_key:
            prefix = "lora_te" if len(clips) == 1 else f"lora_te{clips.index(component) + 1}"
        return f"{prefix}_{module.replace('.', '_')}"

    return name


def diffusers_name(component: str, module: str) -> str:
    return f"{component}.{module}"


def write_file(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    return path


def dense_updates(lora: Lora | Any) -> Deltas:
    """The updates of a LoRA or concept as dense matrices."""
    return {
        (component, module): _to_float64(update)
        for component, updates in lora.updates.items()
        for module, update in updates.items()
    }


def assert_close(actual: Deltas, expected: Deltas, tolerance: float = 1e-6) -> None:
    """Assert that the layers are the same, and their updates equal up to float32 rounding."""
    assert actual.keys() == expected.keys()
    for key, delta in expected.items():
        matrix = delta.flatten(1)
        assert actual[key].shape == matrix.shape, key
        error = (actual[key] - matrix).norm() / matrix.norm().clamp_min(1e-9)
        assert error <= tolerance, (key, float(error))


def _to_float64(update: LowRank) -> Tensor:
    return update.scale * (update.up.double() @ update.down.double())

"""A concept as it was at an earlier step, from the checkpoints of its run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from customize.concepts.adapter import saved_module_name
from customize.concepts.types import Concept
from customize.core.lowrank import LowRank
from customize.families import Family


def concept_at(finished: Concept, folder: Path, step: int, family: Family) -> Concept:
    """The concept after a number of steps.

    Args:
        finished: trained by the method "orthogonal", which trains one factor of each update.
        folder: its output folder, with a checkpoint of the step.
        step: number.
        family: of the base. Checkpoints number the layers in its order, files sort them.
    """
    state = load_file(folder / ".checkpoints" / f"step-{step:06d}.safetensors")

    def rows(key: str) -> Tensor:
        flat, layers = state[f"tokens/{key}"], finished.info.token_layers
        return flat.unflatten(0, (layers, -1)).transpose(0, 1).contiguous() if layers else flat

    products: dict[str, dict[str, LowRank]] = {}
    for part, updates in finished.updates.items():
        modules = [saved_module_name(part, module) for module in family.adapter_targets(part)]
        products[part] = {
            module: replace(updates[module], up=state[f"adapter/{part}/{number}"])
            for number, module in enumerate(modules)
        }
    return replace(
        finished, updates=products, embeddings={key: rows(key) for key in finished.embeddings}
    )

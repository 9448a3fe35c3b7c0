"""A concept as it was at an earlier step of its run, from the checkpoints that the run kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from customize.concepts.concept import Concept
from customize.core.lowrank import LowRank


def concept_at(finished: Concept, folder: Path, step: int) -> Concept:
    """The concept that a run of so many steps would have saved, were its schedule the same.

    Args:
        finished: learned by the method "orthogonal", of whose updates only one factor trains.
        folder: its output folder, with a checkpoint of the step.
    """
    state = load_file(folder / ".checkpoints" / f"step-{step:06d}.safetensors")

    def rows(key: str) -> Tensor:
        flat, layers = state[f"tokens/{key}"], finished.info.token_layers
        return flat.unflatten(0, (layers, -1)).transpose(0, 1).contiguous() if layers else flat

    products = {
        part: {
            module: replace(update, up=state[f"adapter/{part}/{number}"])
            for number, (module, update) in enumerate(updates.items())
        }
        for part, updates in finished.products.items()
    }
    for part, updates in finished.products.items():
        for module, update in updates.items():
            found: LowRank = products[part][module]
            if found.up.shape != update.up.shape:
                raise SystemExit(f"the checkpoint of step {step} in {folder} is of another run")
    return replace(
        finished, products=products, embeddings={key: rows(key) for key in finished.embeddings}
    )

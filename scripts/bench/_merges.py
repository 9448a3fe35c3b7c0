"""The compared merges: ours on low-rank updates, and peft's as its users run them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _common
import torch
from _workers import folder_name
from peft import LoraConfig, get_peft_model
from peft.utils import set_peft_model_state_dict

from customize.concepts import adapter as adapters
from customize.concepts.input_statistics import LayerInputs, layer_inputs_path
from customize.concepts.io.read_concept import load_concept
from customize.concepts.merge.merge_concepts import merge_concepts
from customize.concepts.types import Concept
from customize.core.lowrank import LowRank


@dataclass(frozen=True, eq=False)
class Learned:
    """A concept and its recorded layer inputs."""

    concept: Concept
    record: LayerInputs

    @classmethod
    def load(cls, folder: Path) -> Learned:
        return cls(load_concept(folder), LayerInputs.load(layer_inputs_path(folder)))


Products = dict[str, dict[str, LowRank]]
Merge = Callable[[Any, Sequence[Learned], float], Products]

# How the concepts were learned.
AVOIDING, SLICED, SAME, PLAIN = (
    "slices that avoid what is shared",
    "the paper's slices",
    "same slice",
    "ordinary LoRA",
)


def by_ours(method: str) -> Merge:
    """One of our merges, with one weight for all concepts."""

    def merge(family: Any, learned: Sequence[Learned], weight: float) -> Products:
        concepts = [entry.concept for entry in learned]
        records = [entry.record for entry in learned]
        return merge_concepts(concepts, [weight] * len(concepts), method, records)

    return merge


def by_peft(combination: str) -> Merge:
    """peft's `add_weighted_adapter` as its users run it; returns low-rank updates."""

    def merge(family: Any, learned: Sequence[Learned], weight: float) -> Products:
        concepts = [entry.concept for entry in learned]
        merged: Products = {}
        for part in concepts[0].updates:
            fitted = [
                adapters.match_to_model({part: c.updates[part]}, family)[part] for c in concepts
            ]
            names = [f"a{k}" for k in range(len(concepts))]
            rank = fitted[0][next(iter(fitted[0]))].rank
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(fitted[0]))
            model = get_peft_model(family.components[part], config, adapter_name=names[0])
            try:
                for name, updates in zip(names, fitted, strict=True):
                    if name != names[0]:
                        model.add_adapter(name, config)
                    state = {}
                    for module, update in updates.items():
                        state[f"base_model.model.{module}.lora_A.weight"] = update.down
                        state[f"base_model.model.{module}.lora_B.weight"] = update.up * update.scale
                    set_peft_model_state_dict(model, state, adapter_name=name)
                extra = {} if combination == "linear" else {"density": 0.5}
                torch.manual_seed(0)
                model.add_weighted_adapter(
                    names, [weight] * len(names), "merged", combination_type=combination, **extra
                )
                layers = dict(model.base_model.model.named_modules())
                merged[part] = {
                    module: LowRank(
                        layers[module].lora_B["merged"].weight.detach().clone(),
                        layers[module].lora_A["merged"].weight.detach().clone(),
                        layers[module].scaling["merged"],
                    )
                    for module in fitted[0]
                }
            finally:
                model.unload()
        return merged

    return merge


OURS = f"{AVOIDING}, fusion"
AVERAGE = f"{PLAIN}, average"
SUMS = (f"{AVOIDING}, sum", f"{SLICED}, sum")

METHODS: dict[str, tuple[str, Merge]] = {
    **{f"{kind}, fusion": (kind, by_ours("fusion")) for kind in (AVOIDING, SLICED, PLAIN)},
    **{f"{kind}, sum": (kind, by_ours("sum")) for kind in (AVOIDING, SLICED, SAME, PLAIN)},
    AVERAGE: (PLAIN, by_ours("average")),
    **{f"{PLAIN}, {m}": (PLAIN, by_ours(m)) for m in ("truncate", "magnitude", "dare", "ties")},
    "peft linear": (PLAIN, by_peft("linear")),
    "peft ties": (PLAIN, by_peft("ties")),
    "peft dare_linear": (PLAIN, by_peft("dare_linear")),
}


def reader(description: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark that reads the concepts of merge_identity.py."""
    parser = _common.parser(description)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/merge_identity"),
        help="folder of merge_identity.py",
    )
    return parser


def kept(folder: Path) -> Path:
    """Where the latest run has its concepts.

    Raises:
        SystemExit: there was none.
    """
    known = sorted(folder.glob(f"*/{folder_name(PLAIN)}"), key=lambda p: p.stat().st_mtime)
    if not known:
        raise SystemExit(f"{folder} holds no concepts: run merge_identity.py first")
    return known[-1].parent

"""The merges that are compared: ours on the products, and peft's as its users run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import set_peft_model_state_dict

from customize.concepts import adapter as adapters
from customize.concepts.concept import Concept
from customize.core.lowrank import MERGES, LowRank

Products = dict[str, dict[str, LowRank]]
Merge = Callable[[Any, Sequence[Concept], float], Products]

# How the concepts were learned.
SLICED, SAME, PLAIN = "disjoint slices", "same slice", "ordinary LoRA"


def by_products(method: str) -> Merge:
    """One of our merges: on the products, with one weight for all."""

    def merge(family: Any, concepts: Sequence[Concept], weight: float) -> Products:
        first = concepts[0].products
        return {
            part: {
                module: MERGES[method](
                    [c.products[part][module] for c in concepts], [weight] * len(concepts)
                )
                for module in first[part]
            }
            for part in first
        }

    return merge


def by_peft(combination: str) -> Merge:
    """peft's `add_weighted_adapter`, run as users run it; its result is read back as products."""

    def merge(family: Any, concepts: Sequence[Concept], weight: float) -> Products:
        merged: Products = {}
        for part in concepts[0].products:
            fitted = [adapters.fit({part: c.products[part]}, family)[part] for c in concepts]
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


OURS, AVERAGE = "Orthogonal Adaptation, sum", "ordinary LoRA, average"

METHODS: dict[str, tuple[str, Merge]] = {
    OURS: (SLICED, by_products("sum")),
    "same slice for all, sum": (SAME, by_products("sum")),
    "ordinary LoRA, sum": (PLAIN, by_products("sum")),
    AVERAGE: (PLAIN, by_products("average")),
    "peft linear": (PLAIN, by_peft("linear")),
    "peft ties": (PLAIN, by_peft("ties")),
    "peft dare_linear": (PLAIN, by_peft("dare_linear")),
}

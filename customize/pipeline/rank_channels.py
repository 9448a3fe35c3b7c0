"""Which concept each rank of a merged adapter belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from customize.concepts.adapter import match_to_model
from customize.concepts.merge.merge_concepts import plan_merge
from customize.concepts.types import Lora
from customize.core.routing import rank_owners
from customize.errors import PipelineError
from customize.families import Family
from customize.pipeline.model_guards import ADAPTER_NAME
from customize.pipeline.state import AttachedState


@dataclass(frozen=True, eq=False)
class RankChannels:
    """The ranks of one layer's adapter.

    Attributes:
        component: Such as "unet".
        module: Name of the layer in the component.
        layer: peft's LoRA layer.
        owners: For each rank the index of its concept, in the order of the attached ones.
    """

    component: str
    module: str
    layer: Any
    owners: tuple[int, ...]

    @property
    def down(self) -> Any:
        """The module whose output is the mid-activation, (..., ranks)."""
        return self.layer.lora_A[ADAPTER_NAME]


def rank_channels(family: Family, state: AttachedState) -> list[RankChannels]:
    """Return the owners of the ranks of all layers that attached concepts adapt.

    Args:
        family: The models of the pipeline.
        state: The concepts attached to them.

    Raises:
        PipelineError: A part of a concept is in no rank of its own: a concept is fused into the
            weights, changes biases or norms, or was merged by a method that mixes ranks; or
            someone removed the adapter.
    """
    for name, attached in state.attached.items():
        if attached.fused:
            raise _unroutable(
                f"the concept {name} is fused into the weights", "load it without fuse=True"
            )
        if isinstance(attached.concept, Lora) and attached.concept.vector_updates:
            raise _unroutable(
                f"the concept {name} changes biases or norms, which act on the whole picture",
                "leave together= out for it",
            )
    if not state.has_all_adapters:
        raise _unroutable("the adapter was removed by someone else", "call load_custom again")
    concepts = [attached.concept for attached in state.attached.values()]
    weights = [attached.weight for attached in state.attached.values()]
    planned = match_to_model(plan_merge(concepts, weights), family)
    channels = []
    for adapter in state.adapters:
        for component, layers in adapter.layers.items():
            for module, layer in layers.items():
                up = layer.lora_B[ADAPTER_NAME].weight.detach().flatten(1)
                if not up.shape[1]:
                    continue  # wrapped for the concepts of another call
                plan = planned[component][module]
                owners = rank_owners(up, [update.up.to(up.device) for update in plan.updates])
                if owners is None:
                    raise _unroutable(
                        f"the merge {state.merge_plan.method} has mixed the concepts in the layer "
                        f"{component}.{module}, so that none of its ranks is one concept's",
                        'merge by "fusion", or by "sum" concepts that share no slice',
                    )
                channels.append(RankChannels(component, module, layer, tuple(owners)))
    return channels


def _unroutable(problem: str, fix: str) -> PipelineError:
    return PipelineError(problem, where="together", fix=fix)

"""Which concept each rank of a merged update belongs to, and masks of its mid-activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from customize.base.offload import materialize
from customize.concepts.merge.merge_concepts import LayerMerge
from customize.concepts.types import Lora
from customize.core.lowrank import LowRank
from customize.core.routing import own_down, rank_owners
from customize.errors import PipelineError
from customize.families import Family
from customize.families.pipeline_components import uncompiled
from customize.families.token_layout import TokenKind
from customize.pipeline.model_guards import ADAPTER_NAME
from customize.pipeline.state import AttachedState
from customize.pipeline.transaction import plan_layers

#: Mid-activation -> its mask; None to leave it. Both are (..., positions, ranks), or (batch, ranks,
#: ...) for a convolution.
MaskFunction = Callable[[Tensor], Tensor | None]
#: Mid-activation -> for each of its entries whether concepts act by their own updates, (entries,).
EntryFunction = Callable[[Tensor], Tensor]

# The key of the channels in the state's derived values.
_CACHE = "rank channels"


@dataclass(frozen=True, eq=False)
class RankChannels:
    """The ranks of one layer's update.

    Attributes:
        component: Such as "unet".
        module: Name of the layer in the component.
        layer: peft's LoRA layer; for an update in the weight the layer, with or without adapters.
        owners: For each rank the index of its concept, in the order of the attached ones.
        tokens: The positions of a denoiser's layer; None for a layer without positions.
        fused: The update, if it is in the weight.
        own: (ranks, in), the down-projection by which each concept is itself, times the scale of
            the up-projection; None if the merge has left the concepts as they are.
    """

    component: str
    module: str
    layer: Any
    owners: tuple[int, ...]
    tokens: TokenKind | None
    fused: LowRank | None = None
    own: Tensor | None = None
    _factors: dict[Any, Any] = field(default_factory=dict, repr=False)

    def mask(self, masks: MaskFunction, own_entries: EntryFunction | None = None) -> Any:
        """Multiply the mid-activation by masks, until the returned handle is removed.

        An update in the weight gets what is missing at the layer's output::

            y = x (W + B A)^T + (x A^T * (M - 1)) B^T

        Args:
            masks: Called with the mid-activation in every call of the layer.
            own_entries: Entries in which concepts act by their own updates instead of the merged
                ones; None for none.
        """
        if self.fused is None:
            down = self.layer.lora_A[ADAPTER_NAME]
            return down.register_forward_hook(partial(self._multiply, masks, own_entries))
        return self.layer.register_forward_hook(
            partial(self._add_difference, self.fused, masks, own_entries)
        )

    def _multiply(
        self,
        masks: MaskFunction,
        own_entries: EntryFunction | None,
        module: Any,
        args: Any,
        output: Tensor,
    ) -> Tensor | None:
        mask = masks(output)
        if mask is None:
            return None
        return self._own_middle(own_entries, module, args[0], output) * mask

    def _own_middle(
        self, own_entries: EntryFunction | None, base: Any, inputs: Tensor, middle: Tensor
    ) -> Tensor:
        """Return the mid-activation, in some entries by the concepts' own down-projections."""
        if own_entries is None or self.own is None:
            return middle
        key = ("own", inputs.device, inputs.dtype)
        if key not in self._factors:
            self._factors[key] = _shaped(self.own.to(inputs), base)
        entries = own_entries(middle).reshape(-1, *[1] * (middle.ndim - 1))
        return torch.where(entries, _apply(base, inputs, self._factors[key]), middle)

    def _add_difference(
        self,
        fused: LowRank,
        masks: MaskFunction,
        own_entries: EntryFunction | None,
        module: Any,
        args: Any,
        output: Tensor,
    ) -> Tensor | None:
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        down, up = self._moved(fused, args[0], base)
        middle = _apply(base, args[0], down)
        mask = masks(middle)
        if mask is None:
            return None
        difference = self._own_middle(own_entries, base, args[0], middle) * mask - middle
        if isinstance(base, nn.Linear):
            return output + functional.linear(difference, up)
        return output + torch.einsum("or,br...->bo...", up, difference)

    def _moved(self, fused: LowRank, like: Tensor, base: Any) -> tuple[Tensor, Tensor]:
        """Return the factors on the device and in the dtype of an input; the scale is in ``up``."""
        key = (like.device, like.dtype)
        if key not in self._factors:
            down = _shaped(fused.down.to(like), base)
            self._factors[key] = down, (fused.up * fused.scale).to(like)
        factors: tuple[Tensor, Tensor] = self._factors[key]
        return factors


def _shaped(down: Tensor, base: Any) -> Tensor:
    """Return a down-projection (ranks, in) in the shape of the weight of a layer's kind."""
    if isinstance(base, nn.Linear):
        return down
    return down.reshape(len(down), base.in_channels, *base.kernel_size)


def _apply(base: Any, inputs: Tensor, down: Tensor) -> Tensor:
    if isinstance(base, nn.Linear):
        return functional.linear(inputs, down)
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[down.ndim - 3]
    return convolve(inputs, down, None, base.stride, base.padding, base.dilation)


def rank_channels(family: Family, state: AttachedState) -> list[RankChannels]:
    """Return the owners of the ranks of all layers that attached concepts change.

    They are computed once for what is attached: other calls of the models wait for the caller.

    Args:
        family: The models of the pipeline.
        state: The concepts attached to them.

    Raises:
        PipelineError: A part of a concept is in no rank of its own: a concept with words changes
            biases or norms, or was merged by a method that mixes ranks; or someone removed the
            adapter.
    """
    if not state.has_all_adapters:
        raise _unroutable("the adapter was removed by someone else", "call load_custom again")
    if _CACHE not in state.derived:
        with materialize(family.adaptable):  # weights may be offloaded
            state.derived[_CACHE] = _find_channels(family, state)
    found: list[RankChannels] = state.derived[_CACHE]
    return found


def _find_channels(family: Family, state: AttachedState) -> list[RankChannels]:
    for name, attached in state.attached.items():
        has_words = any((*attached.concept.info.triggers, attached.concept.info.trigger_words))
        if isinstance(attached.concept, Lora) and attached.concept.vector_updates and has_words:
            raise _unroutable(
                f"the concept {name} changes biases or norms, which act on the whole picture",
                "leave together= out for it",
            )
    method = state.merge_plan.method
    channels = []
    beside, in_weights = (
        plan_layers(family, state.attached, state.merge_plan, fused=fused)
        for fused in (False, True)
    )
    numbers = {
        fused: [k for k, item in enumerate(state.attached.values()) if item.fused == fused]
        for fused in (False, True)
    }
    kinds = {key: family.layer_tokens(key) for key in family.denoisers}
    for adapter in state.adapters:
        for component, layers in adapter.layers.items():
            tokens = kinds.get(component, {})
            for module, layer in layers.items():
                up = layer.lora_B[ADAPTER_NAME].weight.detach().flatten(1)
                if not up.shape[1]:
                    continue  # wrapped for the concepts of another call
                plan = beside[component][module]
                owners, own = _owners(up, plan, numbers[False], f"{component}.{module}", method)
                if own is not None:
                    own = own / layer.scaling[ADAPTER_NAME]
                kind = tokens.get(module)
                channels.append(RankChannels(component, module, layer, owners, kind, own=own))
    for component, plans in in_weights.items():
        model = uncompiled(family.components[component])
        for module, plan in _nonzero(plans).items():
            update = plan.compute()
            where = f"{component}.{module}"
            owners, own = _owners(update.up, plan, numbers[True], where, method)
            if own is not None:
                own = own / update.scale
            layer, tokens = model.get_submodule(module), kinds.get(component, {})
            kind = tokens.get(module)
            channels.append(RankChannels(component, module, layer, owners, kind, update, own))
    return channels


def _nonzero(plans: Mapping[str, LayerMerge]) -> dict[str, LayerMerge]:
    return {module: plan for module, plan in plans.items() if any(u.rank for u in plan.updates)}


def _owners(
    up: Tensor, plan: LayerMerge, numbers: list[int], where: str, method: str
) -> tuple[tuple[int, ...], Tensor | None]:
    """Return the index of the attached concept of each column, and :func:`own_down` of a merge.

    ``numbers`` are the indices of the concepts of the plan.
    """
    owners = rank_owners(up, [update.up.to(up.device) for update in plan.updates])
    if owners is None:
        raise _unroutable(
            f"the merge {method} has mixed the concepts in the layer {where}, so that none of its "
            "ranks is one concept's",
            'merge by "fusion", or by "sum" concepts that share no slice',
        )
    own = None if plan.merge is None else own_down(up, owners, plan.updates, plan.weights)
    return tuple(numbers[owner] for owner in owners), own


def _unroutable(problem: str, fix: str) -> PipelineError:
    return PipelineError(problem, where="together", fix=fix)

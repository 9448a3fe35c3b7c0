"""The transaction that changes which concepts are attached: atomic, and undone bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from customize.base.offload import materialize
from customize.concepts.adapter import attach_updates, match_to_model
from customize.concepts.merge.merge_concepts import plan_merge
from customize.core.lowrank import LowRank
from customize.core.merges import MERGES
from customize.errors import PipelineError
from customize.families import Family
from customize.pipeline.fuse_weights import (
    FusedUpdates,
    check_fusable,
    check_fused_weights,
    fuse_updates,
)
from customize.pipeline.model_guards import (
    ADAPTER_NAME,
    active_adapters,
    guard_fusing,
    unguard_fusing,
)
from customize.pipeline.set_biases_and_norms import (
    VectorSums,
    check_set_vectors,
    check_vectors,
    set_vectors,
    sum_vectors,
)
from customize.pipeline.set_tokens import set_tokens
from customize.pipeline.state import AttachedConcept, AttachedState, MergePlan, set_state
from customize.pipeline.validation import check_layers, check_range

# An adapter may have one of these dtypes; quantized and 8-bit storage types cannot compute.
_ADAPTER_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: component -> module name -> update beside the weight.
AdapterUpdates = Mapping[str, Mapping[str, LowRank]]


@dataclass(frozen=True, eq=False)
class _Updates:
    """What a set of attached concepts does to the models.

    Attributes:
        adapters: Merged updates beside the weights.
        weights: Merges for the weights, computed when they are fused.
        vectors: Sums for biases and norms.
    """

    adapters: AdapterUpdates
    weights: FusedUpdates
    vectors: VectorSums


def apply_attachments(
    family: Family,
    state: AttachedState,
    after: dict[str, AttachedConcept],
    merge_plan: MergePlan,
) -> None:
    """Change adapters, weights, biases, norms and vocabularies from what is attached to ``after``.

    After an error everything is as it was before the call.

    Args:
        family: Family of all components that the state changes.
        state: State of the models, which is changed with them.
        after: Concept name -> concept.
        merge_plan: How they are merged, with input statistics of each for "fusion".

    Raises:
        ConfigError: An update leaves the range of its dtype.
        PipelineError: The models are in a state that an adapter would not work in, or someone else
            changed what is attached.
    """
    before, plan_before = state.attached, state.merge_plan
    models = family.adaptable
    adapted = _adapted_layers(state)
    # An adapter is cast with its model, so an existing one has the present dtype.
    adapter_dtypes = {
        component: layer.lora_B[ADAPTER_NAME].weight.dtype
        for (component, _), layer in reversed(adapted.items())
    }
    dtypes = {
        component: adapter_dtypes.get(component)
        or (model.dtype if model.dtype in _ADAPTER_DTYPES else torch.float32)
        for component, model in models.items()
    }
    new = _merge(family, state, after, merge_plan, dtypes)
    old_weights = plan_layers(family, before, plan_before, fused=True)
    old_vectors = sum_vectors(before, plan_before.method)
    layers = {
        (component, module)
        for updates in (new.adapters, new.weights, old_weights, *(a.layers for a in state.adapters))
        for component, modules in updates.items()
        for module in modules
    }
    check_layers(models, sorted(layers), wrapping=not _can_swap(state, new.adapters))
    with_adapter = {
        component
        for adapter in state.adapters
        if adapter.is_attached()
        for component in adapter.models
    }
    for component, model in models.items():
        if ADAPTER_NAME in getattr(model, "peft_config", {}) and component not in with_adapter:
            raise PipelineError(
                f"an adapter named {ADAPTER_NAME} that was not loaded by load_custom is attached",
                where=component,
                fix=f'call delete_adapters("{ADAPTER_NAME}") first, or load it under another name',
            )
    # Tensors created in inference mode cannot be changed outside it. One parameter of each model
    # shows the mode that it was created in, and a walk over all takes long.
    is_inference = any(next(model.parameters()).is_inference() for model in models.values())
    with torch.inference_mode(is_inference), torch.no_grad(), materialize(models):
        check_fusable(models, new.weights, state.weight_originals)
        check_vectors(models, new.vectors, state.vector_originals)
        vector_originals = check_set_vectors(models, old_vectors, state.vector_originals)
        weight_originals = check_fused_weights(models, old_weights, state.weight_originals)
        # Others may have scaled our adapter, by diffusers' set_adapters; idle layers have rank 0.
        factors = {
            key: layer.scaling[ADAPTER_NAME]
            * layer.r[ADAPTER_NAME]
            / layer.lora_alpha[ADAPTER_NAME]
            for key, layer in adapted.items()
            if len(layer.lora_A[ADAPTER_NAME].weight)
        }
        settings = {
            key: (
                list(layer.active_adapters),
                layer.scaling[ADAPTER_NAME],
                {name: p.requires_grad for name, p in layer.named_parameters()},
            )
            for key, layer in adapted.items()
        }
        deleted = [adapter for adapter in state.adapters if not adapter.is_attached()]
        try:
            state.weight_originals.update(weight_originals)
            state.vector_originals.update(vector_originals)
            _rebuild(family, state, after, new, dtypes)
            for key, layer in _adapted_layers(state).items():
                layer.scaling[ADAPTER_NAME] *= factors.get(key, 1.0)
            state.merge_plan = merge_plan
        except BaseException:
            lost = {component for adapter in deleted for component in adapter.models}
            # Without a check of their range: a cast of the model may have left numbers infinite.
            merged = _merge_adapters(family, state, before, plan_before, dtypes, checked=False)
            remaining = {
                component: modules for component, modules in merged.items() if component not in lost
            }
            old = _Updates(remaining, old_weights, old_vectors)
            _rebuild(family, state, before, old, dtypes)
            state.adapters += deleted  # so that they are still known to be missing
            for (component, module), (active, scale, flags) in settings.items():
                layer = models[component].get_submodule(module)
                layer.scaling[ADAPTER_NAME] = scale
                layer.set_adapter(active)
                for name, parameter in layer.named_parameters():
                    parameter.requires_grad_(flags.get(name, False))
            raise


def _rebuild(
    family: Family,
    state: AttachedState,
    attached: dict[str, AttachedConcept],
    updates: _Updates,
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """Bring the models into the state of ``attached``, from any intermediate state."""
    models = family.adaptable
    set_vectors(models, updates.vectors, state.vector_originals)
    can_swap = _can_swap(state, updates.adapters)
    while state.adapters and not can_swap:
        # Also if someone deleted the adapter: its layers are still wrapped.
        adapter = state.adapters.pop()
        for component, layers in adapter.layers.items():
            unguard_fusing(adapter.models[component], layers.values())
        adapter.remove()
    fuse_updates(models, updates.weights, state.weight_originals)
    if can_swap:
        for adapter in state.adapters:
            (component,) = adapter.models
            adapter.replace_updates(updates.adapters, dtypes[component])
    else:
        active = [*active_adapters(models.values()), ADAPTER_NAME]
        for component, layer_updates in updates.adapters.items():
            with warnings.catch_warnings():
                # Adapters of others stay beside ours.
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                adapter = attach_updates(
                    family,
                    {component: layer_updates},
                    name=ADAPTER_NAME,
                    dtype=dtypes[component],
                )
            state.adapters.append(adapter)
            wrapped = list(adapter.layers[component].values())
            guard_fusing(models[component], wrapped)
            for layer in wrapped:
                if list(layer.lora_A) == [ADAPTER_NAME]:
                    # Diffusers asks a single layer which adapters of the whole pipeline are active;
                    # names of adapters that the layer lacks have no effect on it.
                    layer.set_adapter(active, inference_mode=True)
    set_tokens(family, state, attached)
    state.attached = attached
    state.call_reports.clear()
    state.derived.clear()
    set_state(family, state)


def _can_swap(state: AttachedState, updates: AdapterUpdates) -> bool:
    """Return whether the present adapters can carry these updates without wrapping layers anew.

    Adapters wrap no layer that they do not change, except with an update cache, when the next call
    may change it.
    """
    if not state.adapters or not state.has_all_adapters:
        return False
    wrapped = {
        component: layers.keys()
        for adapter in state.adapters
        for component, layers in adapter.layers.items()
    }
    changed = {component: modules.keys() for component, modules in updates.items()}
    if state.update_cache is None:
        return wrapped == changed
    return all(modules <= wrapped.get(component, set()) for component, modules in changed.items())


def _adapted_layers(state: AttachedState) -> dict[tuple[str, str], Any]:
    """Return (component, module name) -> layer, for all that still carry our adapter."""
    return {
        (component, module): layer
        for adapter in state.adapters
        if adapter.is_attached()
        for component, layers in adapter.layers.items()
        for module, layer in layers.items()
    }


def _merge(
    family: Family,
    state: AttachedState,
    attached: Mapping[str, AttachedConcept],
    merge_plan: MergePlan,
    dtypes: Mapping[str, torch.dtype],
) -> _Updates:
    """Merge attached concepts; adapters have the dtypes ``dtypes`` (component -> dtype).

    Raises:
        ConfigError: An update leaves the range of its adapter's dtype.
    """
    weights = plan_layers(family, attached, merge_plan, fused=True)
    vectors = sum_vectors(attached, merge_plan.method)
    adapters = _merge_adapters(family, state, attached, merge_plan, dtypes, checked=True)
    return _Updates(adapters, weights, vectors)


def _merge_adapters(
    family: Family,
    state: AttachedState,
    attached: Mapping[str, AttachedConcept],
    merge_plan: MergePlan,
    dtypes: Mapping[str, torch.dtype],
    *,
    checked: bool,
) -> AdapterUpdates:
    """Merge the concepts beside the weights, or find the result in the update cache.

    Raises:
        ConfigError: ``checked``, and an update leaves the range of its adapter's dtype.
    """

    def merge() -> AdapterUpdates:
        layers = plan_layers(family, attached, merge_plan, fused=False)
        updates = {
            component: {module: layer.truncate() for module, layer in modules.items()}
            for component, modules in layers.items()
        }
        for component, modules in updates.items() if checked else ():
            check_range(component, modules, dtypes[component], layers[component])
        return updates

    def merge_for_cache() -> AdapterUpdates:
        return {
            component: {
                module: _prepare_copy(update, dtypes[component], on_cuda)
                for module, update in modules.items()
            }
            for component, modules in merge().items()
        }

    if state.update_cache is None:
        return merge()
    # Not `.device`, for which diffusers walks over all modules.
    on_cuda = next(family.denoiser.parameters()).is_cuda
    options = (
        merge_plan.method,
        *sorted(merge_plan.method_settings.items()),
        tuple((name, item.weight, item.fused) for name, item in attached.items()),
        *dtypes.values(),
        on_cuda,
        checked,
    )
    statistics = merge_plan.input_statistics if MERGES[merge_plan.method].needs_inputs else {}
    inputs = [*(item.concept for item in attached.values()), *statistics.values()]
    return state.update_cache.get_merged_updates(options, inputs, merge_for_cache)


def _prepare_copy(update: LowRank, dtype: torch.dtype, on_cuda: bool) -> LowRank:
    """Return an update in the adapter's dtype; pinned for CUDA, which copies it asynchronously."""
    up, down = update.up.to(dtype), update.down.to(dtype)
    if on_cuda:
        up, down = up.pin_memory(), down.pin_memory()
    return LowRank(up, down, update.scale)


def plan_layers(
    family: Family, attached: Mapping[str, AttachedConcept], merge_plan: MergePlan, *, fused: bool
) -> FusedUpdates:
    """Return the merges of those concepts that are fused, or of those that are not."""
    merged = [item for item in attached.values() if item.fused == fused]
    if not merged:
        return {}
    others = [item for item in attached.values() if item.fused != fused]
    statistics = merge_plan.input_statistics if MERGES[merge_plan.method].needs_inputs else {}
    is_requested = merge_plan.method == merge_plan.requested_method
    layers = plan_merge(
        [item.concept for item in merged],
        [item.weight for item in merged],
        merge_plan.method,
        inputs=[statistics[item.name] for item in merged] if statistics else (),
        preserved=[statistics[item.name] for item in others] if statistics else (),
        **(merge_plan.method_settings if is_requested else {}),
    )
    return match_to_model(layers, family)

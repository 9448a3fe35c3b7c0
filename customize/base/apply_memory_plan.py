"""Atomic application of a memory plan to a loaded pipeline.

The plan stays applied when concepts are unloaded, because the weights would not fit into memory
without it, and rounding to float8 is not reversible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from customize.base.device import current_accelerator
from customize.base.memory_plan import (
    OFFLOAD_DEVICES,
    MemoryPlan,
    choose_plan,
    layers_to_cast,
    measure_components,
    parse_memory_size,
)
from customize.errors import PipelineError
from customize.families import Family

_PLAN_ATTRIBUTE = "_customize_memory"
# Attributes that the hooks of diffusers and accelerate set on a module.
_HOOK_ATTRIBUTES = ("forward", "_diffusers_hook", "_hf_hook", "_old_forward")
# Attributes that enable_model_cpu_offload sets on a pipeline.
_OFFLOAD_ATTRIBUTES = ("_offload_device", "_offload_gpu_id", "_all_hooks")


def choose_memory_plan(pipe: Any, family: Family, memory: str) -> MemoryPlan | None:
    """Choose the memory plan for a loaded pipeline.

    Args:
        pipe: The pipeline.
        family: Its family.
        memory: Memory size, such as "12GB".

    Returns:
        The plan; None if a plan for the same size is applied already.

    Raises:
        ConfigError: The size is malformed, or too small for the model.
        PipelineError: Another plan is applied, or the model is offloaded already.
    """
    budget = parse_memory_size(memory)
    applied = get_applied_plan(family)
    if applied is not None:
        if applied.budget == budget:
            return None
        raise PipelineError(
            f"the model has a memory plan already: {applied}",
            where="memory",
            fix="load the pipeline again to apply another plan",
        )
    _check_not_offloaded(family)
    if not hasattr(pipe, "enable_model_cpu_offload"):
        raise PipelineError(
            f"{type(pipe).__name__} does not support offloading",
            where="memory",
            fix="use its ComponentsManager's enable_auto_cpu_offload, or a standard pipeline",
        )
    device = execution_device(pipe, family, use_accelerator=True)
    return choose_plan(measure_components(family), budget, device.type)


def get_applied_plan(family: Family) -> MemoryPlan | None:
    """Return the memory plan that is applied to a pipeline, or None."""
    plan: MemoryPlan | None = vars(family.denoiser).get(_PLAN_ATTRIBUTE)
    return plan


def execution_device(pipe: Any, family: Family, use_accelerator: bool) -> torch.device:
    """Return the device that a pipeline's models run on.

    Args:
        pipe: The pipeline.
        family: Its family.
        use_accelerator: Return the accelerator, if any, for a pipeline on the CPU.
    """
    device = getattr(pipe, "_execution_device", None) or family.denoiser.device
    if use_accelerator and device.type == "cpu":
        return current_accelerator() or device
    return device


@contextmanager
def apply_memory_plan(
    pipe: Any, family: Family, plan: MemoryPlan, device: torch.device
) -> Iterator[None]:
    """Apply a memory plan; an error in the body restores the previous state bit for bit.

    Args:
        pipe: The pipeline.
        family: Its family.
        plan: The plan.
        device: The device that the models run on.
    """
    saved = _SavedState.save(pipe, family, plan)
    try:
        if plan.strategy.vae_tiling:
            family.vae.enable_slicing()
            family.vae.enable_tiling()
        if plan.strategy.layerwise_casting:
            family.denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn)
        _offload(pipe, plan, device)
        setattr(family.denoiser, _PLAN_ATTRIBUTE, plan)
        yield
    except BaseException:
        saved.restore(pipe, family)
        raise


def _offload(pipe: Any, plan: MemoryPlan, device: torch.device) -> None:
    if plan.strategy.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif plan.strategy.offload == "group":
        # Leaf level, because diffusers does not find the blocks of text encoders.
        pipe.enable_group_offload(
            device,
            offload_type="leaf_level",
            use_stream=device.type in OFFLOAD_DEVICES,
            low_cpu_mem_usage=device.type in OFFLOAD_DEVICES,
        )
    elif any(model.device != device for model in _models(pipe.components).values()):
        pipe.to(device)


def _check_not_offloaded(family: Family) -> None:
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    for key, model in _models(family.components).items():
        hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
        if hooked or _is_group_offload_enabled(model):
            raise PipelineError(
                "the model is offloaded already, and a memory plan sets its own offloading",
                where=key,
                fix="call remove_all_hooks() first, or load the pipeline again",
            )


@dataclass(eq=False)
class _SavedState:
    """The state of a pipeline before a memory plan.

    Attributes:
        offload_attributes: Attributes of the pipeline for offloading.
        vae_attributes: Attributes of the autoencoder for tiling and slicing.
        hooks: (module, its hook attributes, the state of its hook registry).
        weights: (parameter, its values on the CPU, its device) of the layers to be cast.
        devices: (model, its device).
    """

    offload_attributes: dict[str, Any]
    vae_attributes: dict[str, Any]
    hooks: list[tuple[nn.Module, dict[str, Any], tuple[Any, ...]]]
    weights: list[tuple[nn.Parameter, Tensor, torch.device]]
    devices: list[tuple[Any, torch.device]]

    @classmethod
    def save(cls, pipe: Any, family: Family, plan: MemoryPlan) -> _SavedState:
        models = _models(pipe.components).values()
        layers = layers_to_cast(family.denoiser).values() if plan.strategy.layerwise_casting else ()
        return cls(
            offload_attributes=_select_attributes(pipe, _OFFLOAD_ATTRIBUTES),
            vae_attributes={
                key: value
                for key, value in vars(family.vae).items()
                if "tiling" in key or "slicing" in key
            },
            hooks=[
                (module, _select_attributes(module, _HOOK_ATTRIBUTES), _copy_registry(module))
                for model in models
                for module in model.modules()
            ],
            # On the CPU, so that weights on another device do not take its memory twice.
            weights=[(p, p.data.cpu(), p.device) for layer in layers for p in layer.parameters()],
            devices=[(model, model.device) for model in models],
        )

    def restore(self, pipe: Any, family: Family) -> None:
        vars(family.denoiser).pop(_PLAN_ATTRIBUTE, None)
        for module, attributes, registry in self.hooks:
            for key in _HOOK_ATTRIBUTES:
                vars(module).pop(key, None)
            vars(module).update(attributes)
            if registry:
                current: Any = module._diffusers_hook
                current.hooks, current._hook_order, current._fn_refs = map(copy, registry)
        for parameter, values, device in self.weights:
            parameter.data = values.to(device)
        for model, device in self.devices:
            model.to(device)
        vars(family.vae).update(self.vae_attributes)
        for key in _OFFLOAD_ATTRIBUTES:
            vars(pipe).pop(key, None)
        vars(pipe).update(self.offload_attributes)


def _models(components: Mapping[str, Any]) -> dict[str, Any]:
    return {key: model for key, model in components.items() if isinstance(model, nn.Module)}


def _select_attributes(module: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: vars(module)[key] for key in keys if key in vars(module)}


def _copy_registry(module: Any) -> tuple[Any, ...]:
    registry = vars(module).get("_diffusers_hook")
    if registry is None:
        return ()
    return copy(registry.hooks), copy(registry._hook_order), copy(registry._fn_refs)

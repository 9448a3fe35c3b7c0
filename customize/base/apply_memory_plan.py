"""A memory plan on a loaded pipeline: put in place wholly, or not at all.

It stays when concepts are unloaded, as the offloading that one turns on in diffusers does: its
weights would not fit any more without. Rounding to float8 could not be taken back anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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

_KEY = "_customize_memory"
# What diffusers and accelerate put on a module with their hooks.
_HOOKS = ("forward", "_diffusers_hook", "_hf_hook", "_old_forward")
# What enable_model_cpu_offload puts on a pipeline.
_NOTES = ("_offload_device", "_offload_gpu_id", "_all_hooks")


def choose_memory_plan(pipe: Any, family: Family, word: str) -> MemoryPlan | None:
    """The plan for a pipeline as it is; None where the same was put in place before.

    Raises:
        ConfigError: no such amount, or the model needs more.
        PipelineError: there is a plan or offloading already.
    """
    wanted = parse_memory_size(word)
    already = get_applied_plan(family)
    if already is not None:
        if already.budget == wanted:
            return None
        raise PipelineError(
            f"this model was fitted into memory before, to {already}",
            where="memory",
            fix="load the pipeline anew to fit it into another amount",
        )
    _check_free(family)
    if not hasattr(pipe, "enable_model_cpu_offload"):
        raise PipelineError(
            f"a {type(pipe).__name__} has no offloading of its own",
            where="memory",
            fix="use its ComponentsManager's enable_auto_cpu_offload, or a standard pipeline",
        )
    return choose_plan(
        measure_components(family), wanted, execution_device(pipe, family, True).type
    )


def get_applied_plan(family: Family) -> MemoryPlan | None:
    """The plan that is in place."""
    found: MemoryPlan | None = vars(family.denoiser).get(_KEY)
    return found


def execution_device(pipe: Any, family: Family, anywhere: bool) -> torch.device:
    """Where a pipeline's models compute.

    Args:
        anywhere: whether it may be moved there from the CPU, where there is an accelerator.
    """
    here = getattr(pipe, "_execution_device", None) or family.denoiser.device
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return there if anywhere and here.type == "cpu" and there is not None else here


@contextmanager
def apply_memory_plan(
    pipe: Any, family: Family, plan: MemoryPlan, device: torch.device
) -> Iterator[None]:
    """Put a plan in place; after an error within, all is bit for bit as before.

    Args:
        device: where the models are to compute.
    """
    before = _SavedState.of(pipe, family, plan)
    try:
        if plan.strategy.vae_tiling:
            family.vae.enable_slicing()
            family.vae.enable_tiling()
        if plan.strategy.layerwise_casting:
            family.denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn)
        _place(pipe, plan, device)
        setattr(family.denoiser, _KEY, plan)
        yield
    except BaseException:
        before.restore(pipe, family)
        raise


def _place(pipe: Any, plan: MemoryPlan, device: torch.device) -> None:
    if plan.strategy.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif plan.strategy.offload == "group":
        # By leaves, as text encoders have no blocks that diffusers would find.
        pipe.enable_group_offload(
            device,
            offload_type="leaf_level",
            use_stream=device.type in OFFLOAD_DEVICES,
            low_cpu_mem_usage=device.type in OFFLOAD_DEVICES,
        )
    elif any(model.device != device for model in _models(pipe.components).values()):
        pipe.to(device)


def _check_free(family: Family) -> None:
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    for key, model in _models(family.components).items():
        hooked = any(hasattr(each, "_hf_hook") for each in model.modules())
        if hooked or _is_group_offload_enabled(model):
            raise PipelineError(
                "the model is offloaded already, which a memory plan would do in its own way",
                where=key,
                fix="call remove_all_hooks() first, or load the pipeline anew",
            )


@dataclass(eq=False)
class _SavedState:
    """All that a plan may change.

    Attributes:
        notes: attributes of the pipeline.
        flags: attributes of the autoencoder.
        hooks: (module, its attributes, the state of its registry of hooks).
        weights: (parameter, its values on the CPU, its device), of what is to be cast.
        devices: model -> device.
    """

    notes: dict[str, Any]
    flags: dict[str, Any]
    hooks: list[tuple[nn.Module, dict[str, Any], tuple[Any, ...]]]
    weights: list[tuple[nn.Parameter, Tensor, torch.device]]
    devices: list[tuple[Any, torch.device]]

    @classmethod
    def of(cls, pipe: Any, family: Family, plan: MemoryPlan) -> _SavedState:
        models = _models(pipe.components).values()
        layers = layers_to_cast(family.denoiser).values() if plan.strategy.layerwise_casting else ()
        return cls(
            notes={key: vars(pipe)[key] for key in _NOTES if key in vars(pipe)},
            flags={
                key: vars(family.vae)[key]
                for key in vars(family.vae)
                if "tiling" in key or "slicing" in key
            },
            hooks=[
                (module, _some(module, _HOOKS), _registry(module))
                for model in models
                for module in model.modules()
            ],
            # On the CPU, where what is on another device is only safe from being needed twice.
            weights=[(p, p.data.cpu(), p.device) for each in layers for p in each.parameters()],
            devices=[(model, model.device) for model in models],
        )

    def restore(self, pipe: Any, family: Family) -> None:
        vars(family.denoiser).pop(_KEY, None)
        for module, attributes, registry in self.hooks:
            for key in _HOOKS:
                vars(module).pop(key, None)
            vars(module).update(attributes)
            if registry:
                found: Any = module._diffusers_hook
                found.hooks, found._hook_order, found._fn_refs = (each.copy() for each in registry)
        for parameter, values, device in self.weights:
            parameter.data = values.to(device)
        for model, device in self.devices:
            model.to(device)
        vars(family.vae).update(self.flags)
        for key in _NOTES:
            vars(pipe).pop(key, None)
        vars(pipe).update(self.notes)


def _models(components: Mapping[str, Any]) -> dict[str, Any]:
    return {key: part for key, part in components.items() if isinstance(part, nn.Module)}


def _some(module: nn.Module, keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: vars(module)[key] for key in keys if key in vars(module)}


def _registry(module: Any) -> tuple[Any, ...]:
    found = vars(module).get("_diffusers_hook")
    return () if found is None else (found.hooks.copy(), [*found._hook_order], [*found._fn_refs])

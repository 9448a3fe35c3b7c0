"""Changing models whose weights are not where they seem to be.

Model offload moves whole models and is no obstacle. Sequential offload leaves empty weights behind,
so its hooks go away while a model changes. Group offload keeps lists of a model's weights, which
are made anew afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from customize.errors import PipelineError


@contextmanager
def materialize(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within it, every weight is a real tensor that may be read, changed or wrapped.

    Whatever offloading was on is on again afterwards, also after an error.

    Raises:
        PipelineError: weights lie on disk or were never loaded. Nothing was changed.
    """
    modules = {key: list(model.modules()) for key, model in models.items()}
    devices = {key: _sequential_device(own) for key, own in modules.items()}
    # Where no module has hooks of diffusers, nobody need look for these.
    grouped = [key for key, own in modules.items() if any(map(_has_hooks, own))]
    for key, own in modules.items():
        if key in grouped:
            _check_not_on_disk(key, models[key])
        if devices[key] is None:
            _check_in_memory(key, own)
    hooked = {key: model for key, model in models.items() if devices[key] is not None}
    for model in hooked.values():
        _unhook(model)
    try:
        yield
    finally:
        for key, model in hooked.items():
            _hook(model, devices[key])
        for key in grouped:
            _regroup(models[key])


def check_not_offloaded(models: Mapping[str, nn.Module]) -> None:
    """Refuse models that hooks move about, where they are to be called without their pipeline.

    Raises:
        PipelineError: naming the first.
    """
    from diffusers.hooks.group_offloading import _get_top_level_group_offload_hook

    for key, model in models.items():
        hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
        if hooked or _get_top_level_group_offload_hook(model) is not None:
            raise PipelineError(
                "layer inputs cannot be recorded on a model that is offloaded",
                where=key,
                fix="record them once before offloading is on, or with customize record",
            )


def _sequential_device(modules: Iterable[nn.Module]) -> Any:
    """Where a sequentially offloaded model computes; None for any other model."""
    for module in modules:
        # Not by getattr, as modules are slow to say that they lack something.
        hook: Any = module.__dict__.get("_hf_hook")
        for each in getattr(hook, "hooks", (hook,)):
            # accelerate's AlignDevicesHook; without `offload` it only moves inputs.
            if getattr(each, "offload", False) and hasattr(each, "weights_map"):
                return each.execution_device
    return None


def _has_hooks(module: nn.Module) -> bool:
    return "_diffusers_hook" in module.__dict__  # HookRegistry's own


def _check_not_on_disk(key: str, model: nn.Module) -> None:
    from diffusers.hooks.group_offloading import _get_top_level_group_offload_hook

    group = _get_top_level_group_offload_hook(model)
    if group is not None and group.config.offload_to_disk_path is not None:
        raise PipelineError(
            "the weights are offloaded to disk and cannot be changed there",
            where=key,
            fix="load or unload concepts before enable_group_offload, or offload to memory",
        )


def _check_in_memory(key: str, modules: Iterable[nn.Module]) -> None:
    weights = (weight for module in modules for weight in module._parameters.values())
    if any(weight is not None and weight.is_meta for weight in weights):
        raise PipelineError(
            "the model has weights that were never loaded",
            where=key,
            fix="load the pipeline's weights first",
        )


def _unhook(model: nn.Module) -> None:
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(model, recurse=True)


def _hook(model: nn.Module, device: Any) -> None:
    from accelerate import cpu_offload

    # As diffusers' enable_sequential_cpu_offload calls it.
    cpu_offload(model, device, offload_buffers=len(model._parameters) > 0)


def _regroup(model: nn.Module) -> None:
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    _maybe_remove_and_reapply_group_offloading(model)

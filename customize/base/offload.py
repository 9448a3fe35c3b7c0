"""Changes of models that are offloaded.

Model offload moves whole models and needs no special treatment. Sequential offload leaves meta
tensors in the model, so its hooks are removed while the model changes. Group offload stores lists
of the weights, which are built again afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from customize.errors import PipelineError


@contextmanager
def materialize(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Make all weights real tensors within the context, so that they can be read and changed.

    Offloading is restored on exit, also after an error.

    Args:
        models: Component -> model.

    Raises:
        PipelineError: Weights are offloaded to disk or were never loaded; nothing was changed.
    """
    modules = {key: list(model.modules()) for key, model in models.items()}
    devices = {key: _sequential_offload_device(submodules) for key, submodules in modules.items()}
    grouped = [key for key, submodules in modules.items() if any(map(_has_hooks, submodules))]
    for key, submodules in modules.items():
        if key in grouped:
            _check_not_on_disk(key, models[key])
        if devices[key] is None:
            _check_in_memory(key, submodules)
    hooked = {key: model for key, model in models.items() if devices[key] is not None}
    for model in hooked.values():
        _remove_sequential_offload(model)
    try:
        yield
    finally:
        for key, model in hooked.items():
            _apply_sequential_offload(model, devices[key])
        for key in grouped:
            _reapply_group_offload(models[key])


def check_not_offloaded(models: Mapping[str, nn.Module]) -> None:
    """Check that no model is offloaded, before models are called without their pipeline.

    Raises:
        PipelineError: A model is offloaded.
    """
    for key, model in models.items():
        if is_offloaded(model):
            raise PipelineError(
                "layer inputs cannot be recorded on a model that is offloaded",
                where=key,
                fix="record them once before offloading is on, or with customize record",
            )


def is_offloaded(model: nn.Module) -> bool:
    """Whether a model's weights are moved to the device for each call, by any kind of offload."""
    from diffusers.hooks.group_offloading import _get_top_level_group_offload_hook

    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    return hooked or _get_top_level_group_offload_hook(model) is not None


def _sequential_offload_device(modules: Iterable[nn.Module]) -> Any:
    """Return the execution device of a sequentially offloaded model; None for other models."""
    for module in modules:
        # Not getattr, which is slow for missing attributes of modules.
        hook: Any = module.__dict__.get("_hf_hook")
        for single in getattr(hook, "hooks", (hook,)):
            # accelerate's AlignDevicesHook; without `offload` it only moves inputs.
            if getattr(single, "offload", False) and hasattr(single, "weights_map"):
                return single.execution_device
    return None


def _has_hooks(module: nn.Module) -> bool:
    return "_diffusers_hook" in module.__dict__  # set by diffusers' HookRegistry


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


def _remove_sequential_offload(model: nn.Module) -> None:
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(model, recurse=True)


def _apply_sequential_offload(model: nn.Module, device: Any) -> None:
    from accelerate import cpu_offload

    # The same call as in diffusers' enable_sequential_cpu_offload.
    cpu_offload(model, device, offload_buffers=len(model._parameters) > 0)


def _reapply_group_offload(model: nn.Module) -> None:
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    _maybe_remove_and_reapply_group_offloading(model)

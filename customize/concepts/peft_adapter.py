"""Injecting an adapter into a model by peft, replacing its factors, and undoing both."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from customize.core.lowrank import LowRank

_PEFT_FLAG = "_hf_peft_config_loaded"


def inject_adapter(
    model: nn.Module, updates: Mapping[str, LowRank], name: str, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Wrap layers in peft's LoRA layers, as an adapter that is active beside the others.

    Args:
        model: The denoiser or text encoder.
        updates: Module name -> update.
        name: Adapter name in peft, new to the model.
        dtype: Dtype of the factors; None for the dtype of each layer's weight.

    Returns:
        Module name -> peft's LoRA layer.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from customize.concepts.layer_injection import LayerInjector

    targets = [model.get_submodule(module) for module in updates]
    active = {m: list(m.active_adapters) for m in targets if isinstance(m, BaseTunerLayer)}
    grads = [(p, p.requires_grad) for p in model.parameters()]
    with warnings.catch_warnings():
        # peft warns about every second adapter.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        LayerInjector(model, _lora_config(updates), name)
    model._hf_peft_config_loaded = True  # type: ignore[assignment]

    layers = {}
    for module, update in updates.items():
        layer: Any = model.get_submodule(module)
        weight = layer.get_base_layer().weight
        for factor, value in ((layer.lora_A[name], update.down), (layer.lora_B[name], update.up)):
            moved = value.detach().to(device=weight.device, dtype=dtype or weight.dtype, copy=True)
            factor.weight = nn.Parameter(_reshape(factor, moved), requires_grad=False)
        layer.scaling[name] = update.scale
        layers[module] = layer
    for layer, names in active.items():
        # peft leaves only the newest adapter active.
        layer.set_adapter([*names, name])
    for parameter, flag in grads:
        parameter.requires_grad_(flag)
    return layers


def replace_factors(
    model: nn.Module,
    layers: Mapping[str, Any],
    updates: Mapping[str, LowRank],
    name: str,
    dtype: torch.dtype | None,
) -> None:
    """Replace the updates of an adapter without wrapping its layers again.

    Factors of the same shape are copied in place, asynchronously from pinned memory. In a layer
    without an update the adapter gets rank 0 and is deactivated.

    Args:
        model: The denoiser or text encoder.
        layers: Module name -> peft's LoRA layer, for all layers of the adapter.
        updates: Module name -> update, for some of these layers; ranks may change.
        name: Adapter name in peft.
        dtype: Dtype of the factors; None for the dtype of each layer's weight.
    """
    replaced: dict[Any, Tensor] = {}
    copied: dict[Any, Tensor] = {}
    for module, layer in layers.items():
        weight = layer.get_base_layer().weight
        kind = (weight.device, dtype or weight.dtype)
        factors = (layer.lora_A[name], layer.lora_B[name])
        for factor, value in zip(
            factors, _new_factors(layer, name, updates.get(module)), strict=True
        ):
            old = factor.weight
            if (old.shape, old.device, old.dtype) == (value.shape, *kind):
                copied[factor] = value
            else:
                # Allocated before anything changes, because it may run out of memory.
                replaced[factor] = value.to(*kind, non_blocking=value.is_pinned(), copy=True)
    for factor, value in replaced.items():
        factor.weight = nn.Parameter(value, requires_grad=False)
    with torch.no_grad():
        for factor, value in copied.items():
            factor.weight.copy_(value, non_blocking=value.is_pinned())
    for module, layer in layers.items():
        update = updates.get(module)
        rank, scale = (1, 1.0) if update is None else (update.rank, update.scale)
        # peft computes the scale from these when a weight is set.
        layer.r[name], layer.lora_alpha[name], layer.scaling[name] = rank, scale * rank, scale
        _activate(layer, name, update is not None)
    if updates:
        config: Any = model.peft_config
        config[name] = _lora_config(updates)


def _new_factors(layer: Any, name: str, update: LowRank | None) -> tuple[Tensor, Tensor]:
    """Down- and up-projection in the shapes of peft's layer; of rank 0 without an update."""
    down, up = layer.lora_A[name], layer.lora_B[name]
    if update is None:
        return down.weight.detach()[:0], up.weight.detach()[:, :0]
    return _reshape(down, update.down.detach()), _reshape(up, update.up.detach())


def _activate(layer: Any, name: str, active: bool) -> None:
    """Activate or deactivate an adapter of a layer; ``requires_grad`` flags stay."""
    if active == (name in layer.active_adapters):
        return
    flags = [(p, p.requires_grad) for p in layer.parameters()]
    others = [other for other in layer.active_adapters if other != name]
    layer.set_adapter([*others, name] if active else others, inference_mode=True)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _lora_config(updates: Mapping[str, LowRank]) -> Any:
    """The peft configuration of an adapter with these updates."""
    from peft import LoraConfig

    from customize.concepts.layer_injection import exact_pattern

    rank = Counter(update.rank for update in updates.values()).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(updates),
        rank_pattern={exact_pattern(m): p.rank for m, p in updates.items() if p.rank != rank},
        # peft computes scales from these when a weight is set.
        alpha_pattern={
            exact_pattern(m): p.scale * p.rank
            for m, p in updates.items()
            if p.scale * p.rank != rank
        },
    )


@dataclass(eq=False)
class ModelState:
    """The state of a model that injection changes, besides its layers.

    Attributes:
        requires_grad: Each parameter and its flag.
        has_peft_flag: Whether the model had diffusers' peft flag.
    """

    requires_grad: list[tuple[nn.Parameter, bool]]
    has_peft_flag: bool

    @classmethod
    def capture(cls, model: nn.Module) -> ModelState:
        """Capture the state before injection."""
        grads = [(p, p.requires_grad) for p in model.parameters()]
        return cls(grads, _PEFT_FLAG in model.__dict__)

    def restore(self, model: nn.Module, name: str) -> None:
        """Remove an adapter and restore the state; other adapters stay."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        grads = [(p, p.requires_grad) for p in model.parameters()] + self.requires_grad
        layers = [(k, m) for k, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
        for key, layer in layers:
            others = [other for other in layer._all_available_adapter_names() if other != name]
            if others:
                # Deactivated first, because peft would activate another adapter instead.
                layer.set_adapter([other for other in layer.active_adapters if other != name])
                layer.delete_adapter(name)
            else:
                parent, _, leaf = key.rpartition(".")
                setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
        configs = model.__dict__.get("peft_config", {})
        configs.pop(name, None)
        if not configs:
            # Earlier adapters may have been unloaded since: as stock diffusers leaves the model.
            model.__dict__.pop("peft_config", None)
            model.__dict__.pop(_PEFT_FLAG, None)
            if self.has_peft_flag:
                model.__dict__[_PEFT_FLAG] = None
        for parameter, flag in grads:
            parameter.requires_grad_(flag)


def _reshape(factor: Any, value: Tensor) -> Tensor:
    """A (rows, columns) factor in peft's shape: (rows, channels, *kernel) of a convolution."""
    kernel = getattr(factor, "kernel_size", ())
    return value.reshape(value.shape[0], value.shape[1] // math.prod(kernel), *kernel)

"""What an adapter changes in a model: peft's layers, their factors, and what is restored later."""

from __future__ import annotations

import math
import re
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
    model: nn.Module, products: Mapping[str, LowRank], name: str, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Wrap layers and give the wrapped ones these updates, as an adapter that is active too.

    Args:
        products: module -> update.
        name: peft's adapter name, new to the model.
        dtype: of the factors; None for that of each layer's weight.

    Returns:
        module -> peft's LoRA layer.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    active = {m: list(m.active_adapters) for m in model.modules() if isinstance(m, BaseTunerLayer)}
    grads = [(p, p.requires_grad) for p in model.parameters()]
    config = _config(products)
    # The state dict's keys name the layers exactly, where target_modules also match endings. On
    # the meta device no random numbers are drawn for factors that are set right below.
    keys = {f"{module}.lora_A.weight": update.down for module, update in products.items()}
    with warnings.catch_warnings():
        # Said of every second adapter, also where several are meant.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, model, name, low_cpu_mem_usage=True, state_dict=keys)
    model._hf_peft_config_loaded = True  # type: ignore[assignment]

    layers = {}
    for module, update in products.items():
        layer: Any = model.get_submodule(module)
        weight = layer.get_base_layer().weight
        for factor, value in ((layer.lora_A[name], update.down), (layer.lora_B[name], update.up)):
            placed = value.detach().to(device=weight.device, dtype=dtype or weight.dtype, copy=True)
            factor.weight = nn.Parameter(_shaped(factor, placed), requires_grad=False)
        layer.scaling[name] = update.scale
        layers[module] = layer
    for layer, names in active.items():
        # peft leaves only the newest adapter active.
        ours = name in layer._all_available_adapter_names()
        layer.set_adapter([*names, name] if ours else names)
    for parameter, flag in grads:
        parameter.requires_grad_(flag)
    return layers


def replace_factors(
    model: nn.Module,
    layers: Mapping[str, Any],
    products: Mapping[str, LowRank],
    name: str,
    dtype: torch.dtype | None,
) -> None:
    """Give the layers that carry an adapter other updates, without wrapping any of them anew.

    Factors are copied into the memory of those before where they have their shape, from pinned
    memory without waiting for it. In a layer that the updates leave alone the adapter is not active
    any more, and has rank 0.

    Args:
        layers: module -> peft's LoRA layer, all that carry the adapter.
        products: module -> update, of some of them; ranks may differ from those before.
        dtype: of the factors; None for that of each layer's weight.
    """
    larger: dict[Any, Tensor] = {}
    copied: dict[Any, Tensor] = {}
    for module, layer in layers.items():
        weight = layer.get_base_layer().weight
        kind = (weight.device, dtype or weight.dtype)
        factors = (layer.lora_A[name], layer.lora_B[name])
        for factor, value in zip(
            factors, _factors_of(layer, name, products.get(module)), strict=True
        ):
            now = factor.weight
            if (now.shape, now.device, now.dtype) == (value.shape, *kind):
                copied[factor] = value
            else:
                # Before anything changes, since there may be no memory for it.
                larger[factor] = value.to(*kind, non_blocking=value.is_pinned(), copy=True)
    for factor, value in larger.items():
        factor.weight = nn.Parameter(value, requires_grad=False)
    with torch.no_grad():
        for factor, value in copied.items():
            factor.weight.copy_(value, non_blocking=value.is_pinned())
    for module, layer in layers.items():
        update = products.get(module)
        rank, scale = (1, 1.0) if update is None else (update.rank, update.scale)
        # What peft computes scales from, whenever someone sets another weight.
        layer.r[name], layer.lora_alpha[name], layer.scaling[name] = rank, scale * rank, scale
        _activate(layer, name, update is not None)
    if products:
        config: Any = model.peft_config
        config[name] = _config(products)


def _factors_of(layer: Any, name: str, update: LowRank | None) -> tuple[Tensor, Tensor]:
    """Down and up as peft's layer keeps them; of rank 0 where there is no update."""
    down, up = layer.lora_A[name], layer.lora_B[name]
    if update is None:
        return down.weight.detach()[:0], up.weight.detach()[:, :0]
    return _shaped(down, update.down.detach()), _shaped(up, update.up.detach())


def _activate(layer: Any, name: str, active: bool) -> None:
    """Add an adapter to a layer's active ones, or take it from them; no weight trains by that."""
    if active == (name in layer.active_adapters):
        return
    flags = [(p, p.requires_grad) for p in layer.parameters()]
    others = [other for other in layer.active_adapters if other != name]
    layer.set_adapter([*others, name] if active else others, inference_mode=True)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _config(products: Mapping[str, LowRank]) -> Any:
    """peft's configuration of an adapter with these updates."""
    from peft import LoraConfig

    rank = Counter(update.rank for update in products.values()).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(products),
        rank_pattern={f"^{re.escape(m)}": p.rank for m, p in products.items() if p.rank != rank},
        # What peft computes scales from, whenever someone sets another weight.
        alpha_pattern={
            f"^{re.escape(m)}": p.scale * p.rank
            for m, p in products.items()
            if p.scale * p.rank != rank
        },
    )


@dataclass(eq=False)
class ModelState:
    """What injection changes in a model besides the layers themselves."""

    grads: list[tuple[nn.Parameter, bool]]
    flagged: bool

    @classmethod
    def of(cls, model: nn.Module) -> ModelState:
        grads = [(p, p.requires_grad) for p in model.parameters()]
        return cls(grads, _PEFT_FLAG in model.__dict__)

    def restore(self, model: nn.Module, name: str) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        grads = [(p, p.requires_grad) for p in model.parameters()] + self.grads
        layers = [(k, m) for k, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
        for key, layer in layers:
            others = [other for other in layer._all_available_adapter_names() if other != name]
            if others:
                # Not active any more when it goes, or peft would activate another in its place.
                layer.set_adapter([other for other in layer.active_adapters if other != name])
                layer.delete_adapter(name)
            else:
                parent, _, leaf = key.rpartition(".")
                setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
        configs = model.__dict__.get("peft_config", {})
        configs.pop(name, None)
        if not configs:
            # What was there before may have been unloaded since: as stock diffusers leaves it.
            model.__dict__.pop("peft_config", None)
            model.__dict__.pop(_PEFT_FLAG, None)
            if self.flagged:
                model.__dict__[_PEFT_FLAG] = None
        for parameter, flag in grads:
            parameter.requires_grad_(flag)


def _shaped(factor: Any, value: Tensor) -> Tensor:
    """A factor as peft's layer keeps it: of a convolution, the kernel is the down-projection's."""
    return value.reshape(value.shape[0], *_sides(factor, value))


def _sides(factor: Any, value: Tensor) -> tuple[int, ...]:
    """The shape of a factor's rows in peft's layer: a number, or channels, height and width."""
    kernel = getattr(factor, "kernel_size", ())
    return (value.shape[1] // math.prod(kernel), *kernel)

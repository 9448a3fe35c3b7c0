"""Memory plans: the fastest combination of memory optimizations that fits into a memory size.

The peak memory is estimated from the sizes of the weights on the device and the activations of
the running model, for one image at the default resolution. Optimizations cost time or precision;
:func:`choose_plan` takes the first strategy of :data:`STRATEGIES` that fits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from customize.errors import ConfigError, PipelineError
from customize.families import Family
from customize.text import quote

GIB = 2**30
#: Memory of a device that its driver, library workspaces and fragmentation take, bytes.
RESERVED_BYTES = GIB
#: Upper bound of a text encoder's activations, per unit of its width: 100 values for each of 512
#: tokens, including the logits of an LLM's vocabulary.
TEXT_ACTIVATIONS_PER_WIDTH = 100 * 512
#: Bits per weight in bitsandbytes' 4-bit format, with a float32 scale for each 64 weights.
NF4_BITS = 4.5
#: Layers on the device with streamed group offloading: the current, the next and the previous one.
STREAMED_LAYERS = 3
#: Device types with their own memory, from which models can be offloaded.
OFFLOAD_DEVICES = ("cuda", "xpu")

Offload = Literal["none", "model", "group"]


@dataclass(frozen=True)
class ComponentSize:
    """Memory of one component, in bytes.

    Attributes:
        weights: All parameters and buffers.
        largest_layer: The largest layer.
        other_weights: Parameters and buffers outside of linear, convolution and embedding layers.
        activations: Upper bound of the activations during a call.
        nf4_weights: ``weights`` with the linear layers in 4 bits.
    """

    weights: int
    largest_layer: int
    other_weights: int
    activations: int
    nf4_weights: int


@dataclass(frozen=True)
class PipelineSizes:
    """Memory of a pipeline's components, in bytes.

    Attributes:
        components: Component -> its size.
        denoiser_key: The denoiser's component name.
        float8_denoiser: The denoiser's weights after layerwise casting to float8; its current
            weights where no layer can be cast.
        tiled_vae_activations: Activations of the autoencoder when it decodes in tiles.
    """

    components: Mapping[str, ComponentSize]
    denoiser_key: str
    float8_denoiser: int
    tiled_vae_activations: int


@dataclass(frozen=True)
class MemoryStrategy:
    """A combination of diffusers' memory optimizations.

    Attributes:
        offload: "none": all components stay on the device. "model": one component at a time, by
            ``enable_model_cpu_offload``. "group": a few layers at a time, by
            ``enable_group_offload``.
        vae_tiling: The autoencoder decodes images one by one and in tiles.
        layerwise_casting: The denoiser's layers are stored in float8 and cast for each call.
        quantize: Components that are too large are loaded in 4 bits, by bitsandbytes.
    """

    offload: Offload = "none"
    vae_tiling: bool = False
    layerwise_casting: bool = False
    quantize: bool = False


#: Strategies by speed, except that group offloading, which transfers all weights in each step,
#: comes after the strategies that round weights.
STRATEGIES = (
    MemoryStrategy(),
    MemoryStrategy(vae_tiling=True),
    MemoryStrategy("model"),
    MemoryStrategy("model", vae_tiling=True),
    MemoryStrategy("model", vae_tiling=True, layerwise_casting=True),
    MemoryStrategy("model", vae_tiling=True, quantize=True),
    MemoryStrategy("group", vae_tiling=True),
)
#: Strategies on devices without their own memory, such as the CPU.
STRATEGIES_WITHOUT_OFFLOAD = (
    MemoryStrategy(),
    MemoryStrategy(vae_tiling=True),
    MemoryStrategy(vae_tiling=True, layerwise_casting=True),
)


@dataclass(frozen=True)
class MemoryPlan:
    """A strategy that fits into a memory budget.

    Attributes:
        budget: Memory size that was requested, bytes.
        strategy: The strategy.
        peak: Estimated peak memory without :data:`RESERVED_BYTES`, bytes.
        quantized_components: Components to load in 4 bits.
    """

    budget: int
    strategy: MemoryStrategy
    peak: int
    quantized_components: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"MemoryPlan({self})"

    def __str__(self) -> str:
        strategy, quantized = self.strategy, " and ".join(self.quantized_components)
        measures = {
            "none": ["all models on the device"],
            "model": ["one model on the device at a time"],
            "group": ["a few layers on the device at a time"],
        }[strategy.offload]
        measures += ["autoencoder sliced and tiled"] * strategy.vae_tiling
        measures += ["denoiser stored in float8"] * strategy.layerwise_casting
        measures += [f"{quantized} in 4 bits"] * bool(quantized)
        return (
            f"{self.budget / GIB:.3g} GB: {', '.join(measures)}; {_format_gib(self.peak)} GB needed"
        )


def parse_memory_size(text: str, where: str = "memory") -> int:
    """Parse a memory size such as "12GB" to bytes; 1 GB is 1 GiB, as in the names of cards.

    Args:
        text: The size.
        where: Name of the argument, for the error.

    Raises:
        ConfigError: The size is malformed.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?GB", text) if isinstance(text, str) else None
    if match is None or not 0 < float(match[1]) < 2**40:
        raise ConfigError(
            f"invalid memory size {quote(text)}",
            where=where,
            fix='use for example "8GB", "12GB", "16GB" or "24GB"',
        )
    return int(float(match[1]) * GIB)


def choose_plan(
    sizes: PipelineSizes, budget: int, device: str, quantizer: bool = False
) -> MemoryPlan:
    """Choose the first strategy that fits into a budget.

    Args:
        sizes: Sizes of the pipeline's components.
        budget: Memory size in bytes.
        device: Device type, such as "cuda" or "cpu".
        quantizer: Whether components can be loaded in 4 bits.

    Raises:
        ConfigError: No strategy fits; the message has the smallest size that does.
    """
    can_offload = device in OFFLOAD_DEVICES
    available = budget - (RESERVED_BYTES if can_offload else 0)
    plans = []
    for strategy in STRATEGIES if can_offload else STRATEGIES_WITHOUT_OFFLOAD:
        quantized = _list_too_large(sizes, available) if strategy.quantize else ()
        if strategy.quantize and not (quantizer and quantized):
            continue
        denoiser = sizes.components[sizes.denoiser_key]
        if strategy.layerwise_casting and sizes.float8_denoiser == denoiser.weights:
            continue  # the denoiser is stored in 8 bits or fewer already
        peak = estimate_peak_bytes(sizes, strategy, quantized)
        plans.append(MemoryPlan(budget, strategy, peak, quantized))
        if peak <= available:
            return plans[-1]
    smallest = _format_gib(min(plan.peak for plan in plans) + budget - available)
    reason = "" if can_offload else ", because there is no accelerator to offload from"
    raise ConfigError(
        f"the model does not fit into {budget / GIB:.3g} GB: it needs at least {smallest} GB"
        f"{reason}",
        where="memory",
        fix=f'set memory="{smallest}GB" or more, or use a smaller model',
    )


def estimate_peak_bytes(
    sizes: PipelineSizes, strategy: MemoryStrategy, quantized: tuple[str, ...] = ()
) -> int:
    """Estimate the peak memory of one image at the default resolution, in bytes.

    Args:
        sizes: Sizes of the pipeline's components.
        strategy: The strategy.
        quantized: Components in 4 bits.
    """
    weights, activations, streamed = {}, {}, {}
    for key, size in sizes.components.items():
        weights[key] = size.nf4_weights if key in quantized else size.weights
        activations[key] = size.activations
        streamed[key] = STREAMED_LAYERS * size.largest_layer + size.other_weights
    if strategy.layerwise_casting:
        denoiser = sizes.denoiser_key
        weights[denoiser] = sizes.float8_denoiser
        activations[denoiser] += sizes.components[denoiser].largest_layer  # cast for its call
    if strategy.vae_tiling and "vae" in activations:
        activations["vae"] = sizes.tiled_vae_activations
    if strategy.offload == "none":
        return sum(weights.values()) + max(activations.values())
    on_device = weights if strategy.offload == "model" else streamed
    return max(on_device[key] + activations[key] for key in on_device)


def measure_components(family: Family) -> PipelineSizes:
    """Measure the sizes of a pipeline's components, on any device including meta.

    Raises:
        PipelineError: The pipeline generates videos, or its family has no activation estimates.
    """
    if family.output != "images":
        raise PipelineError(
            "the memory of a video depends on its frames, which the memory plan does not estimate",
            where="memory",
            fix="use the pipeline's own offloading and tiling",
        )
    sizes = {}
    for key, model in family.components.items():
        if not isinstance(model, nn.Module):
            continue
        if key == family.denoiser_key:
            count = family.denoiser_activations()
        elif key == "vae":
            count = family.decoder_activations()
        else:
            count = TEXT_ACTIVATIONS_PER_WIDTH * _hidden_size(model)
        sizes[key] = _measure_component(model, count * _activation_itemsize(model))
    tiled = family.decoder_activations(tiled=True) * _activation_itemsize(family.vae)
    float8 = sizes[family.denoiser_key].weights - _bytes_saved_by_casting(family.denoiser)
    return PipelineSizes(sizes, family.denoiser_key, float8, tiled)


def layers_to_cast(model: Any) -> dict[str, nn.Module]:
    """Return name -> layer of all layers that ``enable_layerwise_casting`` casts."""
    from diffusers.hooks._common import _GO_LC_SUPPORTED_PYTORCH_LAYERS as LAYERS
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
    from peft.tuners.lora.layer import LoraLayer

    skipped = [
        *DEFAULT_SKIP_MODULES_PATTERN,
        *(model._keep_in_fp32_modules or ()),
        *(model._skip_layerwise_casting_patterns or ()),
        *LoraLayer.adapter_layer_names,
    ]

    def is_skipped(name: str) -> bool:
        # All layers within a skipped module are skipped.
        ends = [index for index, char in enumerate(name + ".") if char == "."]
        return any(re.search(pattern, name[:end]) for pattern in skipped for end in ends)

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LAYERS) and not is_skipped(name)
    }


def _bytes_saved_by_casting(model: Any) -> int:
    if getattr(model, "is_quantized", False):
        return 0
    weights = [
        p for layer in layers_to_cast(model).values() for p in layer.parameters(recurse=False)
    ]
    return sum(p.nbytes - p.numel() for p in weights if p.is_floating_point())


def _measure_component(model: nn.Module, activations: int) -> ComponentSize:
    from diffusers.hooks._common import _GO_LC_SUPPORTED_PYTORCH_LAYERS as LAYERS

    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    total = _count_bytes(model)
    in_layers = {
        id(tensor): tensor.nbytes
        for layer in layers
        for tensor in (*layer.parameters(), *layer.buffers())
    }
    linear = {id(layer.weight): layer.weight for layer in layers if isinstance(layer, nn.Linear)}
    saved_by_nf4 = sum(
        weight.nbytes - weight.numel() * NF4_BITS / 8
        for weight in linear.values()
        if weight.is_floating_point() and weight.element_size() > 1
    )
    return ComponentSize(
        weights=total,
        largest_layer=max(map(_count_bytes, layers), default=0),
        other_weights=total - sum(in_layers.values()),
        activations=activations,
        nf4_weights=total - int(saved_by_nf4),
    )


def _count_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _hidden_size(encoder: Any) -> int:
    """Return the width of a transformers model; 0 for any other model."""
    config: Any = getattr(encoder, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "hidden_size", 0)


def _activation_itemsize(model: Any) -> int:
    # Pipelines decode in float32 if the autoencoder's configuration has force_upcast.
    upcast = model.dtype == torch.float16 and getattr(model.config, "force_upcast", False)
    return 4 if upcast else model.dtype.itemsize


def _list_too_large(sizes: PipelineSizes, available: int) -> tuple[str, ...]:
    return tuple(
        key
        for key, size in sizes.components.items()
        if key != "vae" and size.weights + size.activations > available
    )


def _format_gib(count: int) -> str:
    """Format bytes in GiB with one digit, rounded up, so that the number is sufficient."""
    return f"{math.ceil(count / GIB * 10) / 10:g}"

"""How a model fits into so much memory: arithmetic on its sizes, and nothing else.

What is needed at a time is the weights that lie on the device together, and what the model that
computes holds beside them, for one picture of the default resolution. The ways to need less cost
time, or a little precision; :func:`choose_plan` takes the first that fits, in the order of
:data:`STRATEGIES`.
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
#: What a device's driver, library workspaces and fragments take of its memory.
RESERVED_BYTES = GIB
#: How many numbers a text encoder holds at most beside its weights, for each of its width: 100
#: for each of 512 tokens, the scores of an LLM's vocabulary included.
TEXT_ACTIVATIONS_PER_WIDTH = 100 * 512
#: Bits that a weight takes in bitsandbytes' 4-bit format, with a float32 scale for each 64.
NF4_BITS = 4.5
#: Where group offloading streams: the layer that computes, the next one, and the one before.
STREAMED_LAYERS = 3
#: Devices with memory of their own, from which there is somewhere to offload to.
OFFLOAD_DEVICES = ("cuda", "xpu")

Placement = Literal["whole", "model", "group"]


@dataclass(frozen=True)
class ComponentSize:
    """The bytes of one model.

    Attributes:
        weights: all parameters and buffers.
        layer: the largest single layer.
        loose: parameters and buffers outside of linear, convolution and embedding layers.
        working: held at most beside the weights, while it computes.
        quantized: ``weights`` with its linear layers in 4 bits.
    """

    weights: int
    largest_layer: int
    other_weights: int
    activations: int
    nf4_weights: int


@dataclass(frozen=True)
class PipelineSizes:
    """The bytes of all models of a pipeline.

    Attributes:
        parts: component -> bytes.
        denoiser: its key.
        cast: weights of the denoiser with the layers in one byte a number that
            ``enable_layerwise_casting`` casts; its present weights where none is left to cast.
        tiled: ``parts["vae"].working`` where it decodes in tiles.
    """

    components: Mapping[str, ComponentSize]
    denoiser_key: str
    float8_denoiser: int
    tiled_vae_activations: int


@dataclass(frozen=True)
class MemoryStrategy:
    """One way of holding a model.

    Attributes:
        placement: "whole": all on the device. "model": one component at a time, by
            ``enable_model_cpu_offload``. "group": a few layers, by ``apply_group_offloading``.
        tiled: the autoencoder takes pictures one by one, and in tiles.
        cast: the denoiser's layers are stored in float8 and computed in its own dtype.
        quantized: what does not fit otherwise is loaded in 4 bits, by bitsandbytes.
    """

    offload: Placement = "whole"
    vae_tiling: bool = False
    layerwise_casting: bool = False
    quantize: bool = False


#: Fastest first. The three that round weights come after all that only move them, but for group
#: offloading, which sends all weights through the bus in every step.
STRATEGIES = (
    MemoryStrategy(),
    MemoryStrategy(vae_tiling=True),
    MemoryStrategy("model"),
    MemoryStrategy("model", vae_tiling=True),
    MemoryStrategy("model", vae_tiling=True, layerwise_casting=True),
    MemoryStrategy("model", vae_tiling=True, quantize=True),
    MemoryStrategy("group", vae_tiling=True),
)
#: Where there is nowhere to offload to.
STRATEGIES_WITHOUT_OFFLOAD = (
    MemoryStrategy(),
    MemoryStrategy(vae_tiling=True),
    MemoryStrategy(vae_tiling=True, layerwise_casting=True),
)


@dataclass(frozen=True)
class MemoryPlan:
    """A way that fits.

    Attributes:
        budget: bytes of memory, as it was asked for.
        peak: bytes that are needed at most at a time, without :data:`RESERVED_BYTES`.
        quantized: the components to load in 4 bits.
    """

    budget: int
    strategy: MemoryStrategy
    peak: int
    quantized_components: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Plan({self})"

    def __str__(self) -> str:
        way = self.strategy
        words = {
            "whole": "all models on the device",
            "model": "one model on the device at a time",
            "group": "a few layers on the device at a time",
        }
        parts = [words[way.offload]]
        parts += ["autoencoder sliced and tiled"] * way.vae_tiling
        parts += ["denoiser stored in float8"] * way.layerwise_casting
        parts += [f"{' and '.join(self.quantized_components)} in 4 bits"] * bool(
            self.quantized_components
        )
        return f"{self.budget / GIB:.3g} GB: {', '.join(parts)}; {_gib(self.peak)} GB needed"


def parse_memory_size(word: str, where: str = "memory") -> int:
    """ "12GB" to bytes: 12 GiB, as the memory of a 12 GB card is.

    Args:
        where: the argument's name, for messages.

    Raises:
        ConfigError: it is no such word.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?GB", word) if isinstance(word, str) else None
    if found is None or not 0 < float(found[1]) < 2**40:
        raise ConfigError(
            f"{quote(word)} is no amount of memory",
            where=where,
            fix='give one such as "8GB", "12GB", "16GB" or "24GB"',
        )
    return int(float(found[1]) * GIB)


def choose_plan(
    sizes: PipelineSizes, budget: int, device: str, quantizer: bool = False
) -> MemoryPlan:
    """The first of the ways that fits.

    Args:
        budget: bytes.
        device: the type of the device that computes, such as "cuda" or "cpu".
        quantizer: whether weights can be loaded in 4 bits.

    Raises:
        ConfigError: none fits; it tells the least that would do.
    """
    offloading = device in OFFLOAD_DEVICES
    room = budget - (RESERVED_BYTES if offloading else 0)
    plans = []
    for way in STRATEGIES if offloading else STRATEGIES_WITHOUT_OFFLOAD:
        chosen = _too_large(sizes, way, room) if way.quantize else ()
        if way.quantize and not (quantizer and chosen):
            continue
        if (
            way.layerwise_casting
            and sizes.float8_denoiser == sizes.components[sizes.denoiser_key].weights
        ):
            continue  # stored in 8 bits or fewer already
        plans.append(MemoryPlan(budget, way, estimate_peak_bytes(sizes, way, chosen), chosen))
        if plans[-1].peak <= room:
            return plans[-1]
    least = min(each.peak for each in plans) + budget - room
    elsewhere = "" if offloading else ", as there is no accelerator to offload from"
    raise ConfigError(
        f"the model does not fit into {budget / GIB:.3g} GB: it needs {_gib(least)} GB at least"
        f"{elsewhere}",
        where="memory",
        fix=f'give memory="{_gib(least)}GB" or more, or use a smaller model',
    )


def estimate_peak_bytes(
    sizes: PipelineSizes, way: MemoryStrategy, quantized: tuple[str, ...] = ()
) -> int:
    """The bytes that a way needs at most at a time.

    Args:
        quantized: the components that are in 4 bits.
    """
    weights, working, streamed = {}, {}, {}
    for key, part in sizes.components.items():
        weights[key] = part.nf4_weights if key in quantized else part.weights
        working[key] = part.activations
        streamed[key] = STREAMED_LAYERS * part.largest_layer + part.other_weights
    if way.layerwise_casting:
        weights[sizes.denoiser_key] = sizes.float8_denoiser
        working[sizes.denoiser_key] += sizes.components[
            sizes.denoiser_key
        ].largest_layer  # one in its own dtype
    if way.vae_tiling and "vae" in working:
        working["vae"] = sizes.tiled_vae_activations
    if way.offload == "whole":
        return sum(weights.values()) + max(working.values())
    on = weights if way.offload == "model" else streamed
    return max(on[key] + working[key] for key in on)


def measure_components(family: Family) -> PipelineSizes:
    """The sizes of a model's components, on any device, meta included.

    Raises:
        PipelineError: the model draws videos, or is of a family that is not counted.
    """
    if family.output != "images":
        raise PipelineError(
            "what a video needs depends on its frames, which are not counted",
            where="memory",
            fix="use the pipeline's own offloading and tiling",
        )
    parts = {}
    for key, model in family.components.items():
        if not isinstance(model, nn.Module):
            continue
        working = TEXT_ACTIVATIONS_PER_WIDTH * _width(model) * _itemsize(model)
        if key == family.denoiser_key:
            working = family.denoiser_activations() * _itemsize(model)
        elif key == "vae":
            working = family.decoder_activations() * _itemsize(model)
        parts[key] = _part(model, working)
    tiled = family.decoder_activations(tiled=True) * _itemsize(family.vae)
    cast = parts[family.denoiser_key].weights - _saved_by_casting(family.denoiser)
    return PipelineSizes(parts, family.denoiser_key, cast, tiled)


def layers_to_cast(model: Any) -> dict[str, nn.Module]:
    """The layers that ``enable_layerwise_casting`` would cast, by name; adapters are none."""
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
        # Whatever is within a skipped module is skipped, too.
        ends = [index for index, char in enumerate(name + ".") if char == "."]
        return any(re.search(each, name[:end]) for each in skipped for end in ends)

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LAYERS) and not is_skipped(name)
    }


def _saved_by_casting(model: Any) -> int:
    if getattr(model, "is_quantized", False):
        return 0
    weights = [
        p for layer in layers_to_cast(model).values() for p in layer.parameters(recurse=False)
    ]
    return sum(p.nbytes - p.numel() for p in weights if p.is_floating_point())


def _part(model: nn.Module, working: int) -> ComponentSize:
    from diffusers.hooks._common import _GO_LC_SUPPORTED_PYTORCH_LAYERS as LAYERS

    layers = [each for each in model.modules() if isinstance(each, LAYERS)]
    whole = _bytes(model)
    inside = {id(p): p.nbytes for each in layers for p in (*each.parameters(), *each.buffers())}
    linear = {id(p): p for each in layers if isinstance(each, nn.Linear) for p in [each.weight]}
    spared = sum(
        p.nbytes - p.numel() * NF4_BITS / 8
        for p in linear.values()
        if p.is_floating_point() and p.element_size() > 1
    )
    return ComponentSize(
        weights=whole,
        largest_layer=max((_bytes(each) for each in layers), default=0),
        other_weights=whole - sum(inside.values()),
        activations=working,
        nf4_weights=whole - int(spared),
    )


def _bytes(module: nn.Module) -> int:
    return sum(each.nbytes for each in (*module.parameters(), *module.buffers()))


def _width(encoder: Any) -> int:
    """Of a model of transformers; 0 for any other."""
    config: Any = getattr(encoder, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "hidden_size", 0)


def _itemsize(model: Any) -> int:
    # Pipelines decode in float32 where the autoencoder says that float16 would overflow.
    upcast = model.dtype == torch.float16 and getattr(model.config, "force_upcast", False)
    return 4 if upcast else model.dtype.itemsize


def _too_large(sizes: PipelineSizes, way: MemoryStrategy, room: int) -> tuple[str, ...]:
    return tuple(
        key
        for key, part in sizes.components.items()
        if key != "vae" and part.weights + part.activations > room
    )


def _gib(count: int) -> str:
    """GiB with one digit, rounded up, so that what is named suffices."""
    return f"{math.ceil(count / GIB * 10) / 10:g}"

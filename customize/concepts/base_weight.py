"""The weight of a base layer: whether it is plain, and what a quantized layer computes with.

DoRA, OFT, BOFT and the trainer's penalty read the weight; ``fuse=True`` writes it. All of them ask
here, because the tensor that a quantized layer keeps is no weight: bitsandbytes keeps codes,
torchao and quanto keep tensors of their own kind, GGUF and BFL keep packed bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from customize.core.lowrank import all_finite
from customize.errors import PipelineError
from customize.families.adaptable_layers import CONVOLUTIONS

#: What :func:`quantizer_name` calls float8 storage that is cast at each call.
LAYERWISE_CASTING = "layerwise casting"

_WIDE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Python package of a weight's or layer's class -> the quantizer's name.
_QUANTIZERS = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "optimum": "quanto",
    "quanto": "quanto",
    "sdnq": "SDNQ",
    "modelopt": "NVIDIA ModelOpt",
    "auto_round": "AutoRound",
    "auto_round_extension": "AutoRound",
    "hqq": "HQQ",
    "nunchaku": "Nunchaku",
    "gptqmodel": "GPTQ",
    "awq": "AWQ",
    "aqlm": "AQLM",
    "eetq": "EETQ",
}
# Module of a class in diffusers.quantizers or transformers.integrations -> the quantizer's name.
_INTEGRATIONS = {"gguf": "GGUF", "bfl": "BFL's FP8 and NVFP4 checkpoints", "nunchaku": "Nunchaku"}


def base_layer(layer: Any) -> Any:
    """The layer below every peft adapter around it."""
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer


def quantizer_name(layer: Any) -> str:
    """What holds a layer's weight in another form than a plain floating-point tensor.

    Args:
        layer: a linear layer or convolution, with or without peft's adapters around it.

    Returns:
        The quantizer's name, or a description; empty for a plain weight of at least 16 bits.
    """
    layer = base_layer(layer)
    weight = layer.weight
    named = _package(type(weight)) or _package(type(layer))
    if named:
        return named
    if type(weight) not in (nn.Parameter, Tensor):
        return f"a tensor of type {type(weight).__name__}"
    if weight.dtype in _FLOAT8:
        return LAYERWISE_CASTING if _is_stock(layer) else f"weights of {weight.dtype}"
    return "" if weight.dtype in _WIDE else f"weights of {weight.dtype}"


def dense_weight(layer: Any, where: str) -> Tensor:
    """The weight that a layer computes with, dequantized where it is quantized.

    Args:
        layer: a linear layer or convolution, with or without peft's adapters around it.
        where: the layer's name, for errors.

    Returns:
        (out, in) or (out, in, kh, kw), floating point; of a plain layer the weight itself.

    Raises:
        PipelineError: the weight is quantized in a way that cannot be read here.
    """
    layer = base_layer(layer)
    quantizer = quantizer_name(layer)
    if not quantizer:
        plain: Tensor = layer.weight
        return plain
    read = _READERS.get(quantizer)
    if read is None:
        raise _unreadable(quantizer, where)
    try:
        with torch.no_grad():
            weight = read(layer).detach()
            good = tuple(weight.shape) == _shape(layer) and all_finite(weight)
    except Exception as error:  # of another library's code, about its own format
        raise _unreadable(quantizer, where) from error
    if not good:
        raise _unreadable(quantizer, where)
    return weight


def writable_weight(layer: Any, where: str) -> nn.Parameter:
    """The parameter that a layer computes with, to be changed in place.

    Raises:
        PipelineError: the weight is quantized or stored in 8 bits, or computed from others.
    """
    layer = base_layer(layer)
    quantizer = quantizer_name(layer)
    if quantizer:
        raise PipelineError(
            f"nothing can be added to this layer's weight, which is held by {quantizer}",
            where=where,
            fix="load with fuse=False, which leaves the weights alone; or load a base that is not "
            "quantized, and quantize or cast it after fusing",
        )
    weight = layer._parameters.get("weight")
    if weight is None:
        raise PipelineError(
            f"nothing can be added to this layer's weight, which a {type(layer).__name__} computes "
            "from other parameters",
            where=where,
            fix="load with fuse=False, or remove the parametrization first",
        )
    return weight


def _unreadable(quantizer: str, where: str) -> PipelineError:
    return PipelineError(
        f"the adapter depends on this layer's weight, which is held by {quantizer} and cannot be "
        "dequantized here",
        where=where,
        fix="load it into a base that is not quantized, or ask its maker for a plain LoRA",
    )


def find_unadaptable_layers(model: nn.Module) -> dict[str, str]:
    """The layers of a model that a quantizer has replaced by its own, which take no adapter.

    Returns:
        module name -> the quantizer's name.
    """
    found = {name: _package(type(module)) for name, module in model.named_modules()}
    adaptable = (nn.Linear, *CONVOLUTIONS)
    return {
        name: quantizer
        for name, quantizer in found.items()
        if quantizer and not isinstance(model.get_submodule(name), adaptable)
    }


def _package(kind: type) -> str:
    """The quantizer whose package defines a class; empty where none does."""
    root, *inner = kind.__module__.split(".")
    if root in ("diffusers", "transformers") and inner[:1] in (["quantizers"], ["integrations"]):
        return _INTEGRATIONS.get(inner[1], inner[1])
    return _QUANTIZERS.get(root, "")


def _is_stock(layer: Any) -> bool:
    """Whether the layer computes as torch's own does, so that its weight has no scale beside it."""
    return type(layer).forward in [kind.forward for kind in (nn.Linear, *CONVOLUTIONS)]


def _shape(layer: Any) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)


def _bitsandbytes(layer: Any) -> Tensor:
    from bitsandbytes import functional

    weight = layer.weight
    codes = weight.data
    if codes.is_floating_point():  # it is quantized when it is moved to its device
        return codes
    if type(weight).__name__ == "Int8Params":
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return codes * (scales.to(codes.device).view(-1, 1) / 127.0)
    state = layer.quant_state if weight.quant_state is None else weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        # A call on a CPU with AVX512 repacks it. bitsandbytes' inverse changes the state that it is
        # given and leaves the scales as they were packed.
        state = copy.copy(state)
        scales = state.absmax.T.reshape(-1).float()
        state.original_nested = False
        codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
        state.absmax = scales
    return functional.dequantize_4bit(codes, state)


def _quanto(layer: Any) -> Tensor:
    weight = layer.qweight  # None where only activations are quantized
    return layer.weight if weight is None else weight.dequantize()


def _torchao(layer: Any) -> Tensor:
    return layer.weight.dequantize()


def _gguf(layer: Any) -> Tensor:
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    return dequantize_gguf_tensor(layer.weight).to(layer.compute_dtype)


def _bfl(layer: Any) -> Tensor:
    from diffusers.quantizers.bfl.utils import dequantize_fp8r, dequantize_nvfp4

    if layer.weight.dtype == torch.uint8:
        return dequantize_nvfp4(layer.weight, layer.weight_scale, layer.weight_scale_2)
    return dequantize_fp8r(layer.weight, layer.weight_scale)


def _sdnq(layer: Any) -> Tensor:
    from sdnq.utils import get_sdnq_params  # type: ignore[import-not-found]

    if hasattr(layer.weight, "dequantize") and type(layer.weight) is not nn.Parameter:
        return layer.weight.dequantize()
    dequantizer = layer.sdnq_dequantizer
    return dequantizer(
        **get_sdnq_params(layer), skip_quantized_matmul=dequantizer.use_quantized_matmul
    )


_READERS: dict[str, Callable[[Any], Tensor]] = {
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
    "quanto": _quanto,
    "GGUF": _gguf,
    _INTEGRATIONS["bfl"]: _bfl,
    "SDNQ": _sdnq,
    # Float8 storage is exact in any wider type.
    LAYERWISE_CASTING: lambda layer: layer.weight.float(),
}

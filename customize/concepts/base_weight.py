"""The weight of a base layer, dequantized if a quantizer stores it in another form.

DoRA, OFT, BOFT and the trainer's penalty read the weight; ``fuse=True`` writes it. Quantized layers
store codes (bitsandbytes), tensor subclasses (torchao, quanto) or packed bytes (GGUF, BFL).
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

#: The name of diffusers' float8 storage that is cast at each call, for :func:`quantizer_name`.
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
    """Unwrap all peft adapters of a layer."""
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer


def quantizer_name(layer: Any) -> str:
    """The quantizer that stores a layer's weight.

    Args:
        layer: A linear layer or convolution, with or without peft adapters.

    Returns:
        The quantizer's name, or a description; empty for a floating-point weight of at least 16
        bits.
    """
    layer = base_layer(layer)
    weight = layer.weight
    name = _quantizer_of_class(type(weight)) or _quantizer_of_class(type(layer))
    if name:
        return name
    if type(weight) not in (nn.Parameter, Tensor):
        return f"a tensor of type {type(weight).__name__}"
    if weight.dtype in _FLOAT8:
        return LAYERWISE_CASTING if _is_stock(layer) else f"weights of {weight.dtype}"
    return "" if weight.dtype in _WIDE else f"weights of {weight.dtype}"


def dense_weight(layer: Any, where: str) -> Tensor:
    """The weight of a layer, dequantized if it is quantized.

    Args:
        layer: A linear layer or convolution, with or without peft adapters.
        where: The layer's name, for errors.

    Returns:
        (out, in) or (out, in, kh, kw), floating point; the parameter itself if not quantized.

    Raises:
        PipelineError: If the weight cannot be dequantized.
    """
    layer = base_layer(layer)
    quantizer = quantizer_name(layer)
    if not quantizer:
        plain: Tensor = layer.weight
        return plain
    read = _READERS.get(quantizer)
    if read is None:
        raise _unreadable_weight(quantizer, where)
    try:
        with torch.no_grad():
            weight = read(layer).detach()
            is_valid = tuple(weight.shape) == _weight_shape(layer) and all_finite(weight)
    except Exception as error:  # another library's code may raise anything
        raise _unreadable_weight(quantizer, where) from error
    if not is_valid:
        raise _unreadable_weight(quantizer, where)
    return weight


def writable_weight(layer: Any, where: str) -> nn.Parameter:
    """The weight parameter of a layer, for changes in place.

    Args:
        layer: A linear layer or convolution, with or without peft adapters.
        where: The layer's name, for errors.

    Raises:
        PipelineError: If the weight is quantized, has 8 bits, or is computed by a parametrization.
    """
    layer = base_layer(layer)
    quantizer = quantizer_name(layer)
    if quantizer:
        raise PipelineError(
            f"the layer's weight is quantized (format: {quantizer}), so nothing can be added to it",
            where=where,
            fix="load with fuse=False, which changes no weights; or load an unquantized base, and "
            "quantize or cast it after fusing",
        )
    weight = layer._parameters.get("weight")
    if weight is None:
        raise PipelineError(
            f"the layer's weight is computed from other parameters by a {type(layer).__name__}, so "
            "nothing can be added to it",
            where=where,
            fix="load with fuse=False, or remove the parametrization first",
        )
    return weight


def _unreadable_weight(quantizer: str, where: str) -> PipelineError:
    return PipelineError(
        f"the adapter needs the layer's weight, and its format cannot be dequantized: {quantizer}",
        where=where,
        fix="load it into an unquantized base, or ask its author for a plain LoRA",
    )


def find_unadaptable_layers(model: nn.Module) -> dict[str, str]:
    """The layers of a model that a quantizer replaced by classes that adapters do not support.

    Returns:
        Module name -> the quantizer's name.
    """
    quantizers = {name: _quantizer_of_class(type(module)) for name, module in model.named_modules()}
    adaptable = (nn.Linear, *CONVOLUTIONS)
    return {
        name: quantizer
        for name, quantizer in quantizers.items()
        if quantizer and not isinstance(model.get_submodule(name), adaptable)
    }


def _quantizer_of_class(kind: type) -> str:
    """The quantizer whose package defines a class; empty for other classes."""
    root, *inner = kind.__module__.split(".")
    if root in ("diffusers", "transformers") and inner[:1] in (["quantizers"], ["integrations"]):
        return _INTEGRATIONS.get(inner[1], inner[1])
    return _QUANTIZERS.get(root, "")


def _is_stock(layer: Any) -> bool:
    """Whether the forward pass is torch's own, so that no separate scale belongs to the weight."""
    return type(layer).forward in [kind.forward for kind in (nn.Linear, *CONVOLUTIONS)]


def _weight_shape(layer: Any) -> tuple[int, ...]:
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
    # Float8 values are exact in any wider dtype.
    LAYERWISE_CASTING: lambda layer: layer.weight.float(),
}

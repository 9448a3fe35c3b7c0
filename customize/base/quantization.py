"""Quantization of loaded, frozen models by diffusers' quantizers for bitsandbytes and torchao.

diffusers quantizes while loading, moves the result to the GPU at once, and refuses a CPU. Training
needs the GPU for the autoencoder and the text encoders first, so a loaded model is quantized on its
current device instead. The resulting layers are the same.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from customize.errors import ConfigError

QuantizationFormat = Literal["nf4", "int8", "torchao_int8", "torchao_float8"]

_DEVICES = ("cuda", "xpu", "cpu")


def check_quantizer(kind: QuantizationFormat, device: torch.device) -> None:
    """Check that a quantization format is available on a device.

    Raises:
        ConfigError: The library is not installed, or does not support the device.
    """
    library = "torchao" if kind.startswith("torchao") else "bitsandbytes"
    if find_spec(library) is None:
        raise ConfigError(
            f"{kind} needs {library}, which is not installed",
            where="quantize",
            fix=f"pip install {library}, or set quantize to none (--quantize none)",
        )
    if device.type not in _DEVICES:
        raise ConfigError(
            f"{library} does not support the device {device.type}",
            where="quantize",
            fix=f"use one of {', '.join(_DEVICES)}, or set quantize to none (--quantize none)",
        )


def nf4_config(library: Any, dtype: torch.dtype) -> Any:
    """Create the configuration of bitsandbytes' 4-bit NF4 format (QLoRA, arXiv 2305.14314).

    Args:
        library: The module diffusers or transformers, each of which has its own class.
        dtype: The dtype of the arithmetic.
    """
    return library.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


@torch.no_grad()
def quantize_model(
    model: Any, kind: QuantizationFormat, dtype: torch.dtype, device: torch.device
) -> None:
    """Quantize the linear layers of a diffusers model in place, and freeze it.

    Layers that diffusers keeps in float32 and layers with one output are not quantized. The model
    stays on its device; its original weights are released.

    Args:
        model: The model.
        kind: The quantization format.
        dtype: The dtype of the arithmetic.
        device: The device that computes the quantized weights, layer by layer.
    """
    from diffusers.quantizers.auto import DiffusersAutoQuantizer

    quantizer: Any = DiffusersAutoQuantizer.from_config(
        _make_config(kind, dtype), pre_quantized=False
    )
    original_device = model.device
    weights = dict(model.named_parameters())
    excluded = list(model._keep_in_fp32_modules or ())
    # bitsandbytes confuses such weights with transposed ones; and Krea 2's layer of this kind has
    # inputs of four dimensions, while bitsandbytes' int8 supports three.
    excluded += [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == 1
    ]
    # The following steps are those of from_pretrained after reading the weights.
    quantizer.preprocess_model(model, device_map=None, keep_in_fp32_modules=excluded)
    for name in list(weights):
        value = weights.pop(name)
        if quantizer.check_if_quantized_param(model, value, name, {}):
            quantizer.create_quantized_param(model, value, name, device, {}, [])
        else:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, value)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # Otherwise bitsandbytes repacks the layer on some CPUs at its first call without
            # gradients, which rounds it again and disables gradients.
            layer.support_avx512bf16_for_cpu = False
    model.requires_grad_(False).eval()
    model.to(original_device)


def _make_config(kind: QuantizationFormat, dtype: torch.dtype) -> Any:
    import diffusers

    if kind == "nf4":
        return nf4_config(diffusers, dtype)
    if kind == "int8":
        return diffusers.BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    config = Int8WeightOnlyConfig() if kind == "torchao_int8" else Float8WeightOnlyConfig()
    return diffusers.TorchAoConfig(config)

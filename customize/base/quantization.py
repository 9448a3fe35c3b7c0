"""Frozen models in fewer bits, by the quantizers that diffusers has for bitsandbytes and torchao.

diffusers quantizes while it loads, puts what it made on a GPU at once, and refuses a CPU. Training
has other models on the device first, to encode pictures and prompts: so here a loaded model is
quantized where it is, with the same layers as a result.
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
    """See that weights can be held in this format on this device.

    Raises:
        ConfigError: the library is not installed, or isn't for such a device.
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
            f"{library} is not for the device {device.type}",
            where="quantize",
            fix=f"use one of {', '.join(_DEVICES)}, or set quantize to none (--quantize none)",
        )


def nf4_config(library: Any, dtype: torch.dtype) -> Any:
    """What bitsandbytes' 4 bits (QLoRA, arXiv 2305.14314) are to a library.

    Args:
        library: the module diffusers or transformers; each has a class of its own for its models.
        dtype: of the arithmetic.
    """
    return library.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


@torch.no_grad()
def quantize_model(
    model: Any, kind: QuantizationFormat, dtype: torch.dtype, device: torch.device
) -> None:
    """Hold the linear layers of a model of diffusers in fewer bits, but for those that diffusers
    keeps in float32 and those of one output. It stays where it is, frozen; its former weights are
    let go of.

    Args:
        dtype: of the arithmetic.
        device: that computes the quantized weights, a layer at a time.
    """
    from diffusers.quantizers.auto import DiffusersAutoQuantizer

    quantizer: Any = DiffusersAutoQuantizer.from_config(_config(kind, dtype), pre_quantized=False)
    home = model.device
    weights = dict(model.named_parameters())
    kept = list(model._keep_in_fp32_modules or ())
    # Of these bitsandbytes cannot tell a small weight from a transposed one; and Krea 2 gives its
    # own, of 12 numbers, inputs of four dimensions, where bitsandbytes' int8 takes three.
    kept += [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == 1
    ]
    # From here on as from_pretrained does it with weights that it has just read.
    quantizer.preprocess_model(model, device_map=None, keep_in_fp32_modules=kept)
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
            # Else bitsandbytes repacks it on some CPUs at its first call without a gradient, rounds
            # it once more, and lets no gradient through from then on.
            layer.support_avx512bf16_for_cpu = False
    model.requires_grad_(False).eval()
    model.to(home)


def _config(kind: QuantizationFormat, dtype: torch.dtype) -> Any:
    import diffusers

    if kind == "nf4":
        return nf4_config(diffusers, dtype)
    if kind == "int8":
        return diffusers.BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    eight = Int8WeightOnlyConfig() if kind == "torchao_int8" else Float8WeightOnlyConfig()
    return diffusers.TorchAoConfig(eight)

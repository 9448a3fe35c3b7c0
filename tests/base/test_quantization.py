"""Quantization of loaded models on a CPU."""

from importlib.util import find_spec

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from customize.base import quantization
from customize.base.quantization import check_quantizer, quantize_model
from customize.errors import ConfigError
from customize.families import family_of
from tests.tiny import tiny_flux, tiny_sd

CPU = torch.device("cpu")
LIBRARIES = {
    "nf4": "bitsandbytes",
    "int8": "bitsandbytes",
    "torchao_int8": "torchao",
    "torchao_float8": "torchao",
}
#: Relative rounding error of a Gaussian weight matrix.
ERRORS = {"nf4": 0.12, "int8": 0.01, "torchao_int8": 0.01, "torchao_float8": 0.04}


def kind_param(kind, *marks):
    """Return a test parameter, skipped if the library of the kind is not installed."""
    library = LIBRARIES[kind]
    missing = pytest.mark.skipif(find_spec(library) is None, reason=f"{library} is an extra")
    return pytest.param(kind, marks=[missing, *marks])


kinds = pytest.mark.parametrize("kind", [kind_param(kind) for kind in LIBRARIES])


def dequantized(layer):
    """Return the weights of a quantized layer, computed from its outputs."""
    answers = layer(torch.eye(layer.in_features))
    return (answers - (0 if layer.bias is None else layer.bias)).T.detach()


@kinds
@pytest.mark.parametrize("make", [tiny_sd, tiny_flux])
def test_only_linear_layers_are_quantized(make, kind):
    model = family_of(make().components).denoiser
    exact = family_of(make().components).denoiser
    quantize_model(model, kind, torch.float32, CPU)
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert model.is_quantized and model.dtype == torch.float32 and model.device == CPU

    layers = {n: m for n, m in exact.named_modules() if isinstance(m, nn.Linear)}
    assert len(layers) > 20
    quantized = {f"{name}.weight" for name in layers}
    for name, value in exact.named_parameters():
        parameter = model.get_parameter(name)
        assert (type(parameter) is not nn.Parameter) == (name in quantized), name
        if name not in quantized:
            assert torch.equal(parameter, value)
    errors = []
    for name, layer in layers.items():
        weight = layer.weight.detach()
        error = dequantized(model.get_submodule(name)) - weight
        errors.append(float(error.norm() / weight.norm()))
        assert errors[-1] > 0
    assert max(errors) < ERRORS[kind]


@kinds
def test_quantized_layers_support_adapters(kind):
    family = family_of(tiny_flux().components)
    before = family.fingerprint(), family.weight_shapes("transformer")
    quantize_model(family.denoiser, kind, torch.float32, CPU)
    assert (family.fingerprint(), family.weight_shapes("transformer")) == before


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is an extra")
@pytest.mark.parametrize("kind", ["torchao_int8", "torchao_float8"])
def test_weights_are_those_of_diffusers(kind, tmp_path):
    """Only torchao quantizes on a CPU."""
    model = tiny_flux().transformer
    model.save_pretrained(tmp_path)
    config = quantization._make_config(kind, torch.float32)
    theirs = FluxTransformer2DModel.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32
    )
    quantize_model(model, kind, torch.float32, CPU)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            assert torch.equal(dequantized(layer), dequantized(theirs.get_submodule(name))), name


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is an extra")
def test_four_bits_are_those_of_bitsandbytes():
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model, exact = tiny_flux().transformer, tiny_flux().transformer
    quantize_model(model, "nf4", torch.float32, CPU)
    for name, layer in exact.named_modules():
        if isinstance(layer, nn.Linear):
            expected = dequantize_4bit(*quantize_4bit(layer.weight.data, quant_type="nf4"))
            assert torch.allclose(dequantized(model.get_submodule(name)), expected, atol=1e-6)


@pytest.mark.parametrize("kind", LIBRARIES)
def test_what_is_not_there_is_named(kind, monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"{kind} needs {LIBRARIES[kind]}, which is not inst"):
        check_quantizer(kind, CPU)
    monkeypatch.setattr(quantization, "find_spec", lambda name: name)
    check_quantizer(kind, CPU)
    with pytest.raises(ConfigError, match=f"{LIBRARIES[kind]} does not support the device mps"):
        check_quantizer(kind, torch.device("mps"))

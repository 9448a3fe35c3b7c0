"""Dequantized weights, compared with the outputs of the layers."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from customize.concepts.base_weight import (
    dense_weight,
    find_unadaptable_layers,
    quantizer_name,
    writable_weight,
)
from customize.errors import PipelineError

OUT, IN = 64, 64


def plain(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(IN, OUT).to(dtype).requires_grad_(False)


def int8():
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(plain().weight.data, requires_grad=False)
    return layer.to("cpu")


def int8_after_a_call():
    layer = int8()
    layer(torch.ones(1, IN))  # moves the scales from the weight to the layer's state
    assert layer.weight.SCB is None
    return layer


def four_bits(kind, double=False):
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(IN, OUT, quant_type=kind, compress_statistics=double)
    layer.weight = bnb.nn.Params4bit(
        plain().weight.data, quant_type=kind, compress_statistics=double, requires_grad=False
    )
    return layer.to("cpu")


def four_bits_after_a_call(double=False):
    layer = four_bits("nf4", double).eval()
    layer(torch.ones(1, IN))  # some CPUs repack the codes
    return layer


def torchao(config):
    from torchao import quantization

    layer = plain(torch.bfloat16)
    quantization.quantize_(layer, getattr(quantization, config)())
    return layer


def quanto(kind, frozen=True):
    from optimum import quanto as library

    model = nn.Sequential(plain())
    library.quantize(model, weights=getattr(library, kind))
    if frozen:
        library.freeze(model)
    return model[0]


def gguf(kind="Q8_0"):
    import gguf as library
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = getattr(library.GGMLQuantizationType, kind)
    packed = library.quants.quantize(plain().weight.numpy(), kind)
    layer = GGUFLinear(IN, OUT, bias=True, compute_dtype=torch.float32)
    layer.weight = GGUFParameter(torch.from_numpy(packed), quant_type=kind)
    return layer.requires_grad_(False)


def fp8r():
    from diffusers.quantizers.bfl.utils import BFLFP8RLinear, quantize_fp8r

    layer = BFLFP8RLinear(IN, OUT, compute_dtype=torch.float32)
    layer.weight.data, layer.weight_scale = quantize_fp8r(plain().weight)
    return layer


def nvfp4():
    from diffusers.quantizers.bfl.utils import BFLNVFP4Linear, quantize_nvfp4

    layer = BFLNVFP4Linear(IN, OUT, compute_dtype=torch.float32)
    layer.weight.data, layer.weight_scale, layer.weight_scale_2 = quantize_nvfp4(plain().weight)
    return layer


def cast():
    from diffusers.hooks import apply_layerwise_casting

    layer = plain()
    apply_layerwise_casting(nn.Sequential(layer), torch.float8_e4m3fn, torch.float32)
    assert layer.weight.dtype == torch.float8_e4m3fn
    return layer


def sdnq(kind):
    from sdnq import sdnq_post_load_quant

    model = nn.Sequential(plain())
    return sdnq_post_load_quant(
        model, weights_dtype=kind, minimum_allowed_numel=0, add_skip_keys=False
    )[0]


# Quantizer's name and Python package -> name -> layer, and the most that identity inputs, whose
# products round in the layer's arithmetic, may be off.
LAYERS = {
    ("bitsandbytes", "bitsandbytes"): {
        "int8": (int8, 2e-3),
        "int8 after a call": (int8_after_a_call, 2e-3),
        "nf4": (lambda: four_bits("nf4"), 1e-6),
        "fp4": (lambda: four_bits("fp4"), 1e-6),
        "nf4 twice": (lambda: four_bits("nf4", True), 1e-6),
        "nf4 after a call": (four_bits_after_a_call, 2e-3),
        "nf4 twice after a call": (lambda: four_bits_after_a_call(True), 2e-3),
    },
    ("torchao", "torchao"): {
        "int8": (lambda: torchao("Int8WeightOnlyConfig"), 4e-3),
        "float8": (lambda: torchao("Float8WeightOnlyConfig"), 4e-3),
        "int8 inputs": (lambda: torchao("Int8DynamicActivationInt8WeightConfig"), 8e-3),
    },
    ("quanto", "optimum.quanto"): {
        "int8": (lambda: quanto("qint8"), 1e-6),
        "int4": (lambda: quanto("qint4"), 1e-6),
        "float8": (lambda: quanto("qfloat8"), 1e-6),
        "not frozen": (lambda: quanto("qint8", frozen=False), 1e-6),
    },
    ("GGUF", "gguf"): {"Q8_0": (gguf, 1e-6), "Q4_0": (lambda: gguf("Q4_0"), 1e-6)},
    ("BFL's FP8 and NVFP4 checkpoints", "diffusers"): {"fp8": (fp8r, 1e-6), "nvfp4": (nvfp4, 1e-6)},
    ("layerwise casting", "diffusers"): {"float8": (cast, 1e-6)},
    ("SDNQ", "sdnq"): {
        "int8": (lambda: sdnq("int8"), 2e-3),
        "uint4": (lambda: sdnq("uint4"), 2e-3),
    },
}


def installed(package):
    return find_spec(package.partition(".")[0]) is not None


@pytest.mark.parametrize(
    ("name", "kind", "make", "most"),
    [
        pytest.param(
            name,
            kind,
            make,
            most,
            id=f"{name} {kind}",
            marks=[
                pytest.mark.skipif(not installed(package), reason=f"{package} is an extra"),
                *([pytest.mark.slow] if kind == "int4" else []),  # quanto compiles its kernels
            ],
        )
        for (name, package), kinds in LAYERS.items()
        for kind, (make, most) in kinds.items()
    ],
)
@torch.no_grad()
def test_dequantized_weight_is_that_of_the_forward_pass(name, kind, make, most):
    layer = make()
    assert quantizer_name(layer) == name
    eye = torch.eye(IN, dtype=torch.bfloat16 if name == "torchao" else torch.float32)

    def answers():
        return (layer(eye).float() - layer(torch.zeros_like(eye[:1])).float()).T

    unread = answers() if "after a call" in kind else None
    weight = dense_weight(layer, "layer").float()
    if unread is not None:
        assert torch.equal(answers(), unread)  # reading changes nothing
    assert weight.shape == (OUT, IN)
    exact = plain().weight
    assert 0 < (weight - exact).norm() < 0.2 * exact.norm()
    with pytest.raises(PipelineError, match=f"format: {name}") as refusal:
        writable_weight(layer, "a.layer")
    assert "fuse=False" in str(refusal.value) and "a.layer" in str(refusal.value)
    torch.testing.assert_close(answers(), weight, atol=most, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_plain_weight_is_returned_unchanged(dtype):
    layer = plain(dtype)
    assert quantizer_name(layer) == ""
    assert dense_weight(layer, "") is layer.weight and writable_weight(layer, "") is layer.weight


def test_unknown_tensor_class_is_refused_by_name():
    class Packed(nn.Parameter):
        pass

    layer = plain()
    layer.weight = Packed(layer.weight.data)
    with pytest.raises(PipelineError, match="cannot be dequantized: a tensor of type Packed"):
        dense_weight(layer, "x")
    with pytest.raises(PipelineError, match="format: a tensor of type Packed"):
        writable_weight(layer, "x")


def test_scaled_float8_is_not_returned_as_the_weight():
    class Scaled(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight.float() * 3.0, self.bias)

    layer = Scaled(IN, OUT)
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(
        PipelineError, match=r"cannot be dequantized: weights of torch.float8_e4m3fn"
    ):
        dense_weight(layer, "x")


def test_parametrized_weight_is_readable_and_not_writable():
    layer = nn.utils.parametrizations.weight_norm(plain())
    torch.testing.assert_close(dense_weight(layer, "x"), plain().weight)
    with pytest.raises(
        PipelineError, match="computed from other parameters by a ParametrizedLinear"
    ):
        writable_weight(layer, "x")


def test_layers_replaced_by_a_quantizer_are_named():
    # The class of diffusers cannot be imported without a download of kernels.
    home = {"__module__": "diffusers.quantizers.nunchaku.utils"}
    model = nn.Sequential(plain(), type("SVDQW4A4Linear", (nn.Module,), home)())
    assert find_unadaptable_layers(model) == {"1": "Nunchaku"}

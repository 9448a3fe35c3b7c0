"""DoRA, OFT and fuse=True on bases whose weights are quantized."""

from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import save_file

from customize.base.quantization import quantize_model
from customize.errors import PipelineError
from tests.pipeline.making import assert_same, concept, draw, everything
from tests.tiny import tiny_flux

CPU = torch.device("cpu")
NAME = "transformer_blocks.0.attn.to_q"
KEY = f"transformer.{NAME}"


def bitsandbytes(kind):
    return pytest.param(
        kind, marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="an extra")
    )


def torchao(kind):
    return pytest.param(
        kind, marks=pytest.mark.skipif(find_spec("torchao") is None, reason="an extra")
    )


kinds = pytest.mark.parametrize(
    "kind",
    [
        bitsandbytes("nf4"),
        bitsandbytes("int8"),
        torchao("torchao_int8"),
        torchao("torchao_float8"),
        "layerwise casting",
    ],
)


def quantized(kind):
    pipe = tiny_flux()
    if kind == "layerwise casting":
        pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    else:
        quantize_model(pipe.transformer, kind, torch.float32, CPU)
    return pipe


def layer_weight(pipe):
    """Return the weight of a quantized layer from its outputs, (out, in)."""
    layer = pipe.transformer.get_submodule(NAME)
    with torch.no_grad():
        return (layer(torch.eye(32)) - layer(torch.zeros(1, 32))).T.double()


def dora(path, magnitudes):
    g = torch.Generator().manual_seed(0)
    up, down = 0.1 * torch.randn(32, 3, generator=g), 0.1 * torch.randn(3, 32, generator=g)
    tensors = {f"{KEY}.lora_A.weight": down, f"{KEY}.lora_B.weight": up}
    save_file(tensors | {f"{KEY}.lora_magnitude_vector": magnitudes.float()}, path)
    return up.double() @ down.double()


@kinds
def test_dora_rescales_the_dequantized_weight(kind, tmp_path):
    pipe = quantized(kind)
    before = layer_weight(pipe)
    magnitudes = 1.1 * before.norm(dim=1)
    changed = before + dora(tmp_path / "dora.safetensors", magnitudes)
    expected = magnitudes[:, None] * changed / changed.norm(dim=1, keepdim=True)
    pipe.load_custom(tmp_path / "dora.safetensors")
    assert (expected - before).abs().max() > 0.02
    # The layers round: torchao's to the dtype of the weight, and int8 layers' inputs to 16 bits.
    torch.testing.assert_close(layer_weight(pipe), expected, atol=2e-3, rtol=0)
    pipe.unload_custom()
    assert torch.equal(layer_weight(pipe), before)


@kinds
def test_fusing_is_refused_before_anything_changes(kind):
    pipe = quantized(kind)
    picture, before = draw(pipe), layer_weight(pipe)
    modules = {name: type(module) for name, module in pipe.transformer.named_modules()}
    with pytest.raises(PipelineError, match=r"format: (bits|torchao|layerwise)") as error:
        pipe.load_custom(concept(pipe), fuse=True)
    assert "fuse=False" in str(error.value)
    assert {name: type(module) for name, module in pipe.transformer.named_modules()} == modules
    assert torch.equal(layer_weight(pipe), before) and (draw(pipe) == picture).all()
    assert not pipe.custom.rows
    pipe.load_custom(concept(pipe))  # the way out that the message names
    assert (draw(pipe) != picture).any()


def test_a_base_with_unsupported_quantized_layers_is_refused(tmp_path):
    pipe = tiny_flux()
    rex = concept(pipe)
    dora(tmp_path / "lora.safetensors", torch.ones(32))
    # diffusers' layers cannot be imported without a download of kernels.
    home = {"__module__": "diffusers.quantizers.nunchaku.utils"}
    layer = type("SVDQW4A4Linear", (torch.nn.Module,), home)()
    pipe.transformer.set_submodule(NAME, layer)
    before = everything(pipe)
    for source in (rex, tmp_path / "lora.safetensors"):
        with pytest.raises(PipelineError, match="of the transformer are held by Nunchaku"):
            pipe.load_custom(source)
    assert_same(everything(pipe), before)

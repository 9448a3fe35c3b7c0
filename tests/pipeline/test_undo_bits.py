"""fuse=True is undone bit for bit, whatever values the weights and the updates have."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from customize.errors import ConfigError, PipelineError
from tests.pipeline.making import assert_same, concept, everything
from tests.pipeline.test_dtype_casts import same_bits
from tests.tiny import tiny_flux, tiny_sd

NAME = "transformer_blocks.0.attn.to_q"
KEY = f"transformer.{NAME}"
PIPE = tiny_flux()
LAYER = PIPE.transformer.get_submodule(NAME)
SHAPE = LAYER.weight.shape


def updates(kind, weight):
    """Tensors of a file whose fused weight holds bf16 values by chance, or whatever it holds."""
    g = torch.Generator().manual_seed(1)
    lora = {
        f"{KEY}.lora_down.weight": torch.randn(4, SHAPE[1], generator=g),
        f"{KEY}.lora_up.weight": torch.randn(SHAPE[0], 4, generator=g),
    }
    return {
        "zero": {f"{KEY}.diff": -weight},
        "bfloat16 values": {f"{KEY}.diff": weight.bfloat16().float() - weight},
        "dora_scale of 0": {**lora, f"{KEY}.dora_scale": torch.zeros(SHAPE[0], 1)},
        "lora": lora,
        "nothing": {f"{KEY}.diff": torch.zeros(SHAPE)},
        "negative zeros": {f"{KEY}.diff": torch.full(SHAPE, -0.0)},
    }[kind]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(
        ["zero", "bfloat16 values", "dora_scale of 0", "lora", "nothing", "negative zeros"]
    ),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    path=st.lists(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), max_size=2),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_restored_weights_differ_by_model_casts_only(
    tmp_path_factory, kind, dtype, path, transposed, seed
):
    torch.manual_seed(seed)
    weight = 0.2 * torch.randn(SHAPE)
    weight[0, :4] = torch.tensor([0.0, -0.0, 1e-8, -3e-7])
    if transposed:
        weight = weight.T.contiguous().T
    LAYER.to(torch.float32)
    LAYER.weight = nn.Parameter(weight.clone(), requires_grad=False)
    PIPE.transformer.to(dtype)
    file = tmp_path_factory.mktemp("undo") / "off.safetensors"
    save_file(updates(kind, LAYER.weight.float().contiguous()), file)
    expected = LAYER.weight.detach().clone()
    PIPE.load_custom(file, fuse=True)
    for cast in path:
        PIPE.transformer.to(cast)
        expected = expected.to(cast)
    PIPE.unload_custom()
    assert same_bits(LAYER.weight.contiguous(), expected.contiguous())
    assert LAYER.weight.stride() == expected.stride() and not LAYER._buffers


def test_float8_storage_can_start_with_fused_concepts():
    plain, fused = tiny_flux(), tiny_flux()
    fused.load_custom(concept(fused), weights=[0.1], fuse=True)
    for pipe in (plain, fused):
        pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    fused.unload_custom()
    assert_same(everything(fused), everything(plain))


def test_changing_weights_after_a_cast_starts_from_the_cast_original():
    plain, fused = tiny_flux(), tiny_flux()
    rex = concept(fused)
    fused.load_custom(rex, fuse=True)
    for pipe in (plain, fused):
        pipe.transformer.to(torch.float16).to(torch.float32)
    fused.load_custom(weights={"rex": 0.5})
    plain.load_custom(rex, weights=[0.5], fuse=True)
    torch.testing.assert_close(
        fused.transformer.get_submodule(NAME).weight, plain.transformer.get_submodule(NAME).weight
    )
    for pipe in (plain, fused):
        pipe.unload_custom()
    assert_same(everything(fused), everything(plain))


@pytest.mark.parametrize("view", [False, True])
def test_shared_weights_are_not_fused(view):
    pipe = tiny_sd()
    one = pipe.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
    other = pipe.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k")
    other.weight = nn.Parameter(one.weight.data[:], requires_grad=False) if view else one.weight
    before = everything(pipe)
    with pytest.raises(PipelineError, match=r"weight is shared with unet\.down_blocks.*fuse=False"):
        pipe.load_custom(concept(pipe), fuse=True)
    assert_same(everything(pipe), before)
    pipe.load_custom(concept(pipe))


def test_bases_with_nan_are_refused_unchanged():
    pipe = tiny_flux()
    weight = pipe.transformer.get_submodule(NAME).weight
    weight.data[0, 0] = torch.tensor(0x7FC12345, dtype=torch.int32).view(
        torch.float32
    )  # a NaN with a payload
    before = weight.detach().clone()
    with pytest.raises(ConfigError, match="base's weight has a number that is NaN or infinite"):
        pipe.load_custom(concept(pipe), fuse=True)
    assert same_bits(weight, before) and not pipe.custom.rows


def test_weights_quantized_after_fusing_are_refused_by_name():
    quantization = pytest.importorskip("torchao.quantization")
    pipe = tiny_flux().load_custom(rex := concept(tiny_flux()), fuse=True)
    quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())
    for call in (pipe.unload_custom, lambda: pipe.load_custom(rex)):
        with pytest.raises(PipelineError, match="fused concepts is held by torchao since"):
            call()
    assert pipe.custom.rows

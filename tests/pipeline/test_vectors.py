"""Files that change biases and norms: applied exactly, undone bit for bit, in both modes."""

import pytest
import torch
from safetensors.torch import save_file

from customize.errors import ConceptError, ConfigError, PipelineError
from customize.pipeline.dtype_casts import apply_casts
from tests.pipeline.making import assert_same, concept, draw, everything
from tests.tiny import tiny_flux, tiny_sd
from tests.tiny_video import tiny_wan

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
modes = pytest.mark.parametrize("fuse", [False, True])


def randn(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters(pipe):
    model = getattr(pipe, "unet", None) or pipe.transformer
    return {k.replace(".base_layer", ""): v for k, v in model.named_parameters()}


def lora(module, width, out, rank=2, seed=1, form="peft"):
    down, up = ("lora_A", "lora_B") if form == "peft" else ("lora_down", "lora_up")
    return {
        f"{module}.{down}.weight": randn(rank, width, seed=seed),
        f"{module}.{up}.weight": randn(out, rank, seed=seed + 1),
    }


def kohya_file():
    """Full changes and norms as LyCORIS and ai-toolkit write them, by kohya's keys."""
    flat = "lora_unet_" + BLOCK.replace(".", "_")
    width = tiny_sd().unet.get_submodule(f"{BLOCK}.norm1").weight.numel()
    return {
        f"{flat}_attn1_to_out_0.diff": randn(width, width),
        f"{flat}_attn1_to_out_0.diff_b": randn(width, seed=1),
        **lora(f"{flat}_attn2_to_out_0", width, width, form="kohya"),
        f"{flat}_attn2_to_out_0.alpha": torch.tensor(1.0),
        f"{flat}_attn2_to_out_0.diff_b": randn(width, seed=2),
        f"{flat}_norm1.w_norm": randn(width, seed=3),
        f"{flat}_norm1.b_norm": randn(width, seed=4),
        f"{flat}_norm2.diff": randn(width, seed=5),
        f"{flat}_norm2.diff_b": randn(width, seed=6),
        "lora_unet_conv_in.diff_b": randn(tiny_sd().unet.conv_in.out_channels, seed=7),
    }, {
        f"{BLOCK}.attn1.to_out.0.bias": randn(width, seed=1),
        f"{BLOCK}.attn2.to_out.0.bias": randn(width, seed=2),
        f"{BLOCK}.norm1.weight": randn(width, seed=3),
        f"{BLOCK}.norm1.bias": randn(width, seed=4),
        f"{BLOCK}.norm2.weight": randn(width, seed=5),
        f"{BLOCK}.norm2.bias": randn(width, seed=6),
        "conv_in.bias": randn(tiny_sd().unet.conv_in.out_channels, seed=7),
    }


@modes
@pytest.mark.parametrize("weight", [1.0, -0.4])
def test_biases_and_norms_of_lycoris(fuse, weight, tmp_path):
    tensors, expected = kohya_file()
    save_file(tensors, tmp_path / "rex.safetensors")
    pipe = tiny_sd()
    before = everything(pipe)
    start = {name: value.clone() for name, value in parameters(pipe).items()}
    pipe.load_custom(tmp_path / "rex.safetensors", weights=[weight], fuse=fuse)
    now = parameters(pipe)
    for name, value in start.items():
        if name in expected:
            assert torch.equal(now[name], value + weight * expected[name]), name
        elif not fuse or "to_out" not in name:
            assert torch.equal(now[name], value), name
    pipe.load_custom(weights={"rex": 2.0})
    name = f"{BLOCK}.norm1.weight"
    assert torch.equal(parameters(pipe)[name], start[name] + 2.0 * expected[name])
    pipe.unload_custom()
    assert_same(everything(pipe), before)


@modes
def test_biases_of_projections_equal_those_of_peft(fuse, tmp_path):
    """Also of layers that have no bias, and of both projections."""
    from peft import LoraConfig, inject_adapter_in_model

    names = ["to_q", "to_out.0"]
    config = LoraConfig(r=2, lora_alpha=3, target_modules=names, lora_bias=True)
    stock, pipe = tiny_sd(), tiny_sd()
    inject_adapter_in_model(config, stock.unet, "rex")
    tensors = {}
    for name, value in stock.unet.named_parameters():
        if ".lora_" in name:
            value.data = randn(*value.shape, seed=len(tensors))
            tensors["unet." + name.replace(".rex", "")] = value.data
    assert any(key.endswith("to_q.lora_B.bias") for key in tensors)
    text = '{"unet.lora_alpha": 3, "unet.r": 2, "unet.lora_bias": true}'
    save_file(tensors, tmp_path / "rex.safetensors", {"lora_adapter_metadata": text})
    before = everything(pipe)
    pipe.load_custom(tmp_path / "rex.safetensors", fuse=fuse)
    assert abs(draw(pipe) - draw(stock)).max() < 1e-5
    pipe.unload_custom()
    assert_same(everything(pipe), before)


def test_down_projection_biases_pass_through_the_up_projection(tmp_path):
    name, width = (
        f"{BLOCK}.attn1.to_q",
        tiny_sd().unet.get_submodule(f"{BLOCK}.attn1.to_q").in_features,
    )
    tensors = lora(f"unet.{name}", width, width)
    tensors[f"unet.{name}.lora_A.bias"] = randn(2, seed=8)
    save_file(tensors, tmp_path / "rex.safetensors")
    pipe = tiny_sd().load_custom(tmp_path / "rex.safetensors")
    expected = tensors[f"unet.{name}.lora_B.weight"] @ tensors[f"unet.{name}.lora_A.bias"]
    torch.testing.assert_close(pipe.unet.get_submodule(name).bias.data, expected)


def test_trained_biases_replace_those_of_the_base(tmp_path):
    """As peft saves them with bias="all": whole values, half of the way at weight 0.5."""
    pipe = tiny_sd()
    name = f"{BLOCK}.attn1.to_out.0"
    start = parameters(pipe)[f"{name}.bias"].clone()
    values = randn(len(start), seed=3)
    tensors = lora(f"unet.{name}", len(start), len(start))
    tensors[f"unet.{name}.base_layer.bias"] = values
    save_file(tensors, tmp_path / "rex.safetensors")
    pipe.load_custom(tmp_path / "rex.safetensors")
    torch.testing.assert_close(parameters(pipe)[f"{name}.bias"].data, values)
    pipe.load_custom(weights={"rex": 0.5})
    torch.testing.assert_close(parameters(pipe)[f"{name}.bias"].data, (start + values) / 2)


@modes
def test_trained_norms_replace_those_of_the_base(fuse, tmp_path):
    """As peft saves them with modules_to_save."""
    from peft import LoraConfig, get_peft_model

    stock, pipe = tiny_sd(), tiny_sd()
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"], modules_to_save=["norm1"])
    model = get_peft_model(stock.unet, config)
    for index, (name, value) in enumerate(model.named_parameters()):
        if ".lora_" in name or "modules_to_save" in name:
            value.data += randn(*value.shape, seed=index)
    model.save_pretrained(tmp_path / "rex")
    before = everything(pipe)
    pipe.load_custom(tmp_path / "rex", fuse=fuse)
    assert abs(draw(pipe) - draw(stock)).max() < 1e-5
    pipe.unload_custom()
    assert_same(everything(pipe), before)


@pytest.mark.parametrize("key", ["text_encoder.text_model.", "lora_te_text_model_"])
def test_the_last_norm_of_a_text_encoder(key, tmp_path):
    """It lies outside of the encoder's layers."""
    pipe = tiny_sd()
    norm = next(m for n, m in pipe.text_encoder.named_modules() if n.endswith("final_layer_norm"))
    start = norm.weight.detach().clone()
    tensors = {f"{key}final_layer_norm.{part}": randn(len(start)) for part in ("w_norm", "b_norm")}
    save_file(tensors, tmp_path / "rex.safetensors")
    pipe.load_custom(tmp_path / "rex.safetensors")
    assert torch.equal(norm.weight.data, start + randn(len(start)))
    pipe.unload_custom()
    assert torch.equal(norm.weight.data, start)


def test_norm_names_of_wan_and_flux(tmp_path):
    pipe = tiny_wan()
    width = pipe.transformer.blocks[0].norm2.weight.numel()
    norm = pipe.transformer.blocks[1].attn1.norm_q.weight.numel()
    start = {k: v.clone() for k, v in parameters(pipe).items()}
    tensors = {
        "diffusion_model.blocks.0.norm3.diff": randn(width),
        "diffusion_model.blocks.0.norm3.diff_b": randn(width, seed=1),
        "diffusion_model.blocks.1.self_attn.norm_q.diff": randn(norm, seed=2),
        "diffusion_model.blocks.1.cross_attn.norm_k.diff": randn(norm, seed=3),
        "diffusion_model.blocks.0.self_attn.q.diff_b": randn(width, seed=4),
    }
    save_file(tensors, tmp_path / "rex.safetensors")
    pipe.load_custom(tmp_path / "rex.safetensors")
    for key, name in {
        "blocks.0.norm3.diff": "blocks.0.norm2.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "blocks.1.self_attn.norm_q.diff": "blocks.1.attn1.norm_q.weight",
        "blocks.1.cross_attn.norm_k.diff": "blocks.1.attn2.norm_k.weight",
        "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
    }.items():
        expected = start[name] + tensors[f"diffusion_model.{key}"]
        assert torch.equal(parameters(pipe)[name], expected), name
    pipe = tiny_flux()
    name = "transformer_blocks.0.attn.norm_added_k.weight"
    values = randn(len(parameters(pipe)[name]))
    file = tmp_path / "flux.safetensors"
    save_file({"double_blocks.0.txt_attn.norm.key_norm.scale": values}, file)
    pipe.load_custom(file)
    torch.testing.assert_close(parameters(pipe)[name].data, values)


def test_several_updates_add_up_and_follow_casts(tmp_path):
    tensors, expected = kohya_file()
    for name in ("rex", "tom"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    plain, pipe = tiny_sd(), tiny_sd()
    start = {name: value.clone() for name, value in parameters(pipe).items()}
    files = [tmp_path / f"{name}.safetensors" for name in ("rex", "tom")]
    pipe.load_custom(*files, weights=[0.5, 0.25])
    for name, change in expected.items():
        total = start[name] + 0.5 * change + 0.25 * change
        torch.testing.assert_close(parameters(pipe)[name].data, total)
    pipe.load_custom(weights={"rex": 0.5, "tom": 0.5}, merge="average")
    name = f"{BLOCK}.norm1.weight"
    torch.testing.assert_close(parameters(pipe)[name].data, start[name] + 0.5 * expected[name])
    for cast in (plain, pipe):
        cast.unet.half().float()
    pipe.unload_custom("tom")
    total = apply_casts(start[name], (torch.float16, torch.float32)) + 0.5 * expected[name]
    torch.testing.assert_close(parameters(pipe)[name].data, total)
    pipe.unload_custom()
    assert_same(everything(pipe), everything(plain))


def test_block_weights_scale_biases_and_norms(tmp_path):
    tensors, expected = kohya_file()
    save_file(tensors, tmp_path / "rex.safetensors")
    pipe = tiny_sd()
    start = {name: value.clone() for name, value in parameters(pipe).items()}
    pipe.load_custom(tmp_path / "rex.safetensors", weights=[{"down": 0.0, "unet": 0.5}])
    assert torch.equal(
        parameters(pipe)["conv_in.bias"], start["conv_in.bias"] + 0.5 * expected["conv_in.bias"]
    )
    name = f"{BLOCK}.norm1.weight"
    assert torch.equal(parameters(pipe)[name], start[name])


@modes
def test_a_failure_changes_nothing(fuse, tmp_path):
    tensors, _ = kohya_file()
    save_file(tensors, tmp_path / "rex.safetensors")
    pipe = tiny_sd().to(torch.float16)
    pipe.load_custom(concept(pipe, "tom"))
    before = everything(pipe)
    with pytest.raises(ConfigError, match="leaves the range"):
        pipe.load_custom(tmp_path / "rex.safetensors", weights=[1e6], fuse=fuse)
    assert_same(everything(pipe), before)
    pipe.load_custom(tmp_path / "rex.safetensors", fuse=fuse)
    pipe.unet.get_submodule(f"{BLOCK}.norm1").weight.data[0] += 1
    with pytest.raises(PipelineError, match=r"bias or norm with concepts.*changed by someone else"):
        pipe.unload_custom()


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("norm1.w_norm", (3,), "3 numbers does not fit a weight of"),
        ("norm1.diff", (3, 3), "are not in this sd model"),
        ("attn1.to_q.w_norm", (16,), "vector cannot update the weight matrix"),
        ("attn1.to_q.diff_b", (2, 8), "is not a vector"),
        ("attn1.to_q.lora_A.bias", (2,), "no up-projection"),
    ],
)
def test_mismatched_vectors_are_refused(key, shape, message, tmp_path):
    save_file({f"unet.{BLOCK}.{key}": randn(*shape)}, tmp_path / "rex.safetensors")
    pipe = tiny_sd()
    before = everything(pipe)
    with pytest.raises(ConceptError, match=message):
        pipe.load_custom(tmp_path / "rex.safetensors")
    assert_same(everything(pipe), before)

"""Parts of files that the user leaves out by name."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import customize
from customize.cli.merge_command import merge
from customize.concepts.input_statistics import layer_inputs_path
from customize.concepts.io.write_concept import save_concept
from customize.errors import ConceptError, ConfigError
from tests.pipeline.making import assert_same, concept, draw, everything
from tests.pipeline.test_component_weights import lora
from tests.pipeline.test_vectors import BLOCK, kohya_file, parameters
from tests.tiny import tiny_flux, tiny_sd, tiny_sdxl


def test_components(tmp_path):
    whole = tiny_sdxl()
    file = lora(whole, tmp_path / "rex.safetensors")
    tensors = {k: v for k, v in load_file(file).items() if not k.startswith("text_encoder_2.")}
    save_file(tensors, tmp_path / "less.safetensors")
    whole.load_custom(file, ignore=["text_encoder_2"])
    less = tiny_sdxl().load_custom(tmp_path / "less.safetensors")
    assert (draw(whole) == draw(less)).all()


def test_ignoring_a_text_encoder_without_adapters(tmp_path):
    pipe = tiny_flux()
    file = lora(pipe, tmp_path / "rex.safetensors")
    tensors = load_file(file)
    key = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    tensors |= {
        f"{key}.lora_down.weight": torch.ones(2, 8),
        f"{key}.lora_up.weight": torch.ones(8, 2),
    }
    save_file(tensors, tmp_path / "t5.safetensors")
    before = everything(pipe)
    with pytest.raises(ConceptError, match="T5"):
        pipe.load_custom(tmp_path / "t5.safetensors")
    assert_same(everything(pipe), before)
    pipe.load_custom(tmp_path / "t5.safetensors", ignore="text_encoder_2")
    assert (draw(pipe) == draw(tiny_flux().load_custom(file))).all()


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["bias"], {f"{BLOCK}.norm1.weight", f"{BLOCK}.norm2.weight"}),
        (
            ["norm"],
            {f"{BLOCK}.attn1.to_out.0.bias", f"{BLOCK}.attn2.to_out.0.bias", "conv_in.bias"},
        ),
        (["norm", "bias"], set()),
        (["*_attn1_*", "*conv_in*", "norm"], {f"{BLOCK}.attn2.to_out.0.bias"}),
    ],
)
def test_biases_norms_and_patterns(words, left, tmp_path):
    tensors, _ = kohya_file()
    save_file(tensors, tmp_path / "rex.safetensors")
    pipe = tiny_sd()
    start = {name: value.clone() for name, value in parameters(pipe).items()}
    pipe.load_custom(tmp_path / "rex.safetensors", ignore=words)
    now = parameters(pipe)
    assert {name for name in start if not torch.equal(now[name], start[name])} == left


def test_ignoring_parts_of_objects_in_memory_and_concepts(tmp_path):
    pipe = tiny_sd()
    rex = concept(pipe)
    save_concept(rex, tmp_path / "rex")
    for source in (rex, tmp_path / "rex"):
        pipe.load_custom(source, ignore=["text_encoder"])
        assert not any(hasattr(m, "lora_A") for m in pipe.text_encoder.modules())
        assert any(hasattr(m, "lora_A") for m in pipe.unet.modules())
        pipe.unload_custom()


def test_ignoring_all_layers_of_one_width_of_a_concept(tmp_path):
    """What is left has slices of fewer widths than the whole."""
    pipe = tiny_sdxl()
    rex = concept(pipe)
    left = rex.updates["text_encoder"]
    assert {u.shape[1] for u in left.values()} < {int(width) for width in rex.info.slices}
    pipe.load_custom(rex, ignore=["unet", "text_encoder_2"])
    changed = {c for c in ("unet", "text_encoder", "text_encoder_2") if has_adapter(pipe, c)}
    assert changed == {"text_encoder"}


def has_adapter(pipe, component):
    return any(hasattr(m, "lora_A") for m in getattr(pipe, component).modules())


def test_unreadable_parts_are_refused_with_the_entries_that_ignore_them(tmp_path):
    pipe = tiny_flux()
    tensors = load_file(lora(pipe, tmp_path / "rex.safetensors"))
    t5 = "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"
    for key, shape in {
        f"{t5}.lora_A.weight": (2, 8),
        "bundle_emb.rex.string_to_param.*": (1, 8),
        "transformer.norm_out.linear.weight": (8, 8),
    }.items():
        more = {key: torch.ones(shape)}
        if "lora_A" in key:
            more[key.replace("lora_A", "lora_B")] = torch.ones(8, 2)
        save_file(tensors | more, tmp_path / "more.safetensors")
        with pytest.raises(ConceptError) as error:
            pipe.load_custom(tmp_path / "more.safetensors")
        words = re.search(r"ignore=(\[.*?\])", str(error.value))
        pipe.load_custom(tmp_path / "more.safetensors", ignore=json.loads(words[1]))
        pipe.unload_custom()


def test_unknown_keys_can_be_ignored(tmp_path):
    pipe = tiny_sd()
    file = lora(pipe, tmp_path / "rex.safetensors")
    more = {
        "bundle_emb.rex.string_to_param.*": torch.ones(1, 8),
        "unet.x.set_weight": torch.ones(3),
    }
    save_file(load_file(file) | more, tmp_path / "more.safetensors")
    with pytest.raises(ConceptError, match="ignore="):
        pipe.load_custom(tmp_path / "more.safetensors")
    pipe.load_custom(tmp_path / "more.safetensors", ignore=["embedding", "*.set_weight"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["norm"], "no loaded part matches norm"),
        (["text_encoder_2"], "no loaded part matches text_encoder_2"),
        (["*.ff.*x"], r"no loaded part matches \*\.ff"),
        (["biases"], "unknown part 'biases'.*did you mean bias"),
        ("bias,norm", r"give a list: \['bias', 'norm'\]"),
        ([3], "unknown part 3"),
    ],
)
def test_entries_that_match_nothing_are_refused(words, message, tmp_path):
    pipe = tiny_sd()
    file = lora(pipe, tmp_path / "rex.safetensors")
    before = everything(pipe)
    with pytest.raises(ConfigError, match=message):
        pipe.load_custom(file, ignore=words)
    with pytest.raises(ConceptError, match="leaves out all"):
        pipe.load_custom(file, ignore=["unet", "text_encoder"])
    assert_same(everything(pipe), before)


def test_merge_ignores_parts_or_refuses_unwritable_ones(tmp_path):
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"unet.{name}.lora_A.weight": torch.randn(2, 320),
        f"unet.{name}.lora_B.weight": torch.randn(320, 2),
        "unet.conv_norm_out.w_norm": torch.randn(320),
    }
    save_file(tensors, tmp_path / "rex.safetensors")
    options = dict.fromkeys(("names", "density", "seed", "rank", "base", "dtype"))
    calls = {**options, "merge": "auto", "layout": "diffusers", "family": "sd"}
    source = str(tmp_path / "rex.safetensors")
    with pytest.raises(ConceptError, match=r"changes biases or norms.*--ignore bias,norm"):
        merge([source], tmp_path / "m", None, **calls)
    merge([source], tmp_path / "m", None, **calls, ignore="norm")
    assert len(load_file(tmp_path / "m" / "pytorch_lora_weights.safetensors")) == 2


def test_inputs_of_the_whole_file_are_not_used_for_parts(tmp_path):
    pipe = tiny_sd()
    file = lora(pipe, tmp_path / "rex.safetensors")
    record = customize.record_inputs(pipe, file, prompts=["{} here"], words="rex")
    record.save(layer_inputs_path(file))
    tom = concept(pipe, "tom", index=1)
    save_concept(tom, tmp_path / "tom")
    customize.record_inputs(pipe, tom, prompts=["{} here"]).save(
        layer_inputs_path(tmp_path / "tom")
    )
    pipe.load_custom(file, tmp_path / "tom")
    assert pipe.custom.merge == "fusion"
    pipe.unload_custom()
    pipe.load_custom(file, tmp_path / "tom", ignore=["text_encoder"])
    assert pipe.custom.merge == "sum"

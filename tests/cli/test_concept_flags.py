"""--weights by name, component and block."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from customize.cli.concept_flags import parse_weights
from customize.cli.merge_command import merge
from customize.errors import ConfigError


def test_weights_by_number_and_by_name():
    assert parse_weights(None, 2) == [1.0, 1.0]
    assert parse_weights("1,0.8", 2) == [1.0, 0.8]
    text = "rex=0.8, rex.text_encoder=0.5,rex.unet.up.block_1=0.4/0.8/1,tom=0"
    assert parse_weights(text, 2) == {
        "rex": {"": 0.8, "text_encoder": 0.5, "unet": {"up": {"block_1": [0.4, 0.8, 1.0]}}},
        "tom": 0.0,
    }


@pytest.mark.parametrize("text", ["rex=", "rex=a", "=1", "rex..unet=1", "rex=1,0.5", "rex=1,rex=2"])
def test_invalid_weights_are_refused(text):
    with pytest.raises(ConfigError, match="weight"):
        parse_weights(text, 1)


def test_merge_applies_weights_per_component_and_block(tmp_path):
    block = "{}.attentions.0.transformer_blocks.0.attn1.to_q"
    layers = {
        "unet." + block.format("down_blocks.0"): (320, 0.4),
        "unet." + block.format("up_blocks.1"): (1280, 0.8),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (768, None),
    }
    tensors = {}
    for name, (width, _) in layers.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, width)
        tensors[f"{name}.lora_B.weight"] = torch.randn(width, 2)
    save_file(tensors, tmp_path / "rex.safetensors")
    options = dict.fromkeys(("names", "density", "seed", "rank", "base", "dtype"))
    text = "rex=0.8,rex.text_encoder=0,rex.unet.down=0.4"
    calls = {**options, "merge": "auto", "layout": "diffusers"}
    merge([str(tmp_path / "rex.safetensors")], tmp_path / "m", text, **calls)
    actual = load_file(tmp_path / "m" / "pytorch_lora_weights.safetensors")
    assert not any("text_encoder" in key for key in actual)
    for name, (_, weight) in layers.items():
        if weight:
            up, down = (actual[f"{name}.lora_{side}.weight"] for side in "BA")
            expected = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
            torch.testing.assert_close(up @ down, weight * expected)
    assert "text_encoder 0, unet.down 0.4, else 0.8" in (tmp_path / "m" / "README.md").read_text()
    with pytest.raises(ConfigError, match=r"'dwn'.*down"):
        merge([str(tmp_path / "rex.safetensors")], tmp_path / "n", "rex.unet.dwn=1", **calls)
    with pytest.raises(ConfigError, match="given for tom"):
        merge([str(tmp_path / "rex.safetensors")], tmp_path / "n", "tom=1", **calls)

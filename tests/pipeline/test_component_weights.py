"""Weights by component and block, against stock diffusers' and against files without the parts."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from customize.api.modular_step import ConceptsStep
from customize.errors import ConfigError
from customize.families import family_of
from tests.pipeline.making import assert_same, concept, draw, everything, modular
from tests.tiny import tiny_flux, tiny_sd, tiny_sdxl

BLOCKS = {"down": 0.8, "mid": 0.3, "up": {"block_1": [0.4, 0.9]}}


def lora(pipe, path, seed=0):
    """A LoRA of all attention projections, which stock diffusers reads as well."""
    family = family_of(pipe.components)
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for component in (family.denoiser_key, *family.text_encoders):
        for module, (out, width) in family.adapter_targets(component).items():
            name = f"text_model.{module}" if module.startswith("encoder.") else module
            tensors[f"{component}.{name}.lora_A.weight"] = torch.randn(2, width, generator=g)
            up = 0.3 * torch.randn(out, 2, generator=g)
            tensors[f"{component}.{name}.lora_B.weight"] = up
    save_file(tensors, path)
    return path


def part(path, keep):
    """The file with other factors: ``keep(key)`` gives each layer's."""
    tensors = {}
    for key, value in load_file(path).items():
        factor = keep(key)
        if factor:
            tensors[key] = value * factor if "lora_B" in key else value
    other = Path(path).with_name("part.safetensors")
    save_file(tensors, other)
    return other


@pytest.mark.parametrize(
    ("make", "weights"),
    [
        (tiny_sd, {"unet": BLOCKS, "text_encoder": 0.5}),
        (tiny_sdxl, {"unet": {"down": {"block_1": 0.2}}, "text_encoder_2": 0.0}),
        (tiny_flux, {"transformer": 0.4}),
    ],
)
def test_images_equal_those_of_set_adapters(make, weights, tmp_path):
    ours, stock = make(), make()
    file = lora(ours, tmp_path / "rex.safetensors")
    stock.load_lora_weights(str(tmp_path), weight_name="rex.safetensors", adapter_name="rex")
    full = draw(stock)
    stock.set_adapters("rex", weights)
    ours.load_custom(file, weights={"rex": weights})
    assert abs(draw(stock) - full).max() > 1e-3
    assert abs(draw(ours) - draw(stock)).max() < 1e-4


def test_lists_and_dotted_keys_do_not_warn_about_unchanged_layers(tmp_path, recwarn):
    """A list is for a block's residual layers as well, which most LoRAs do not change."""
    one, two = tiny_sd(), tiny_sd()
    file = lora(one, tmp_path / "rex.safetensors")
    one.load_custom(file, weights={"rex": {"unet": {"up": {"block_1": [0.4, 0.9]}}}})
    two.load_custom(file, weights={"rex": {"unet.up.block_1": [0.4, 0.9]}})
    assert (draw(one) == draw(two)).all()
    assert not [str(w.message) for w in recwarn if "does nothing" in str(w.message)]
    with pytest.warns(UserWarning, match=r"no layer of unet\.down_blocks\.1\.resnets"):
        one.load_custom(weights={"rex": {"down": {"block_1": {"resnets": 0.5}}}})
    with pytest.raises(ConfigError, match=r"unknown key 'unet\.dwn'.*did you mean"):
        one.load_custom(weights={"rex": {"unet.dwn": 0.5}})


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("merge", ["sum", "average", "magnitude", "ties"])
def test_weight_0_of_a_component_equals_a_file_without_it(merge, fuse, tmp_path):
    one, two = tiny_sd(), tiny_sd()
    whole = lora(one, tmp_path / "rex.safetensors")
    less = part(whole, lambda key: "text_encoder" not in key and ".up_blocks." not in key)
    tom = concept(one, "tom", index=1)
    zeros = {"text_encoder": 0, "up": 0.0}
    calls = {"fuse": fuse, "merge": merge}
    one.load_custom(whole, tom, weights=[zeros, 0.7], **calls)
    two.load_custom(less, tom, weights=[1.0, 0.7], names=["rex", None], **calls)
    assert (draw(one) == draw(two)).all()
    assert "text_encoder 0, up 0, else 1" in repr(one.custom)
    one.unload_custom()
    assert_same(everything(one), everything(tiny_sd()))


def test_longer_keys_win_and_the_default_is_1(tmp_path):
    pipe = tiny_sd()
    file = lora(pipe, tmp_path / "rex.safetensors")
    pipe.load_custom(file, weights=[{"unet": 0.5, "down": 0.8, "up_blocks.1.attentions.0": 0}])

    def factor(key):
        if "text_encoder" in key:
            return 1.0
        if ".up_blocks.1.attentions.0." in key:
            return 0.0
        return 0.8 if ".down_blocks." in key else 0.5

    other = tiny_sd().load_custom(part(file, factor))
    assert abs(draw(pipe) - draw(other)).max() < 1e-5
    # A number takes the place of all of it, and an equal dict changes nothing.
    pipe.load_custom(weights={"rex": 1.0})
    assert abs(draw(pipe) - draw(tiny_sd().load_custom(file))).max() < 1e-5


def test_blocks_of_a_transformer(tmp_path):
    pipe = tiny_flux()
    file = lora(pipe, tmp_path / "rex.safetensors")
    pipe.load_custom(
        file,
        weights={
            "rex": {"transformer_blocks": 0.5, "single_transformer_blocks": {"block_0": 0.25}}
        },
    )

    def factor(key):
        if ".single_transformer_blocks.0." in key:
            return 0.25
        return 0.5 if ".transformer_blocks." in key else 1.0

    other = tiny_flux().load_custom(part(file, factor))
    assert abs(draw(pipe) - draw(other)).max() < 1e-5


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({"text_encodr": 0.5}, r"'text_encodr'.*did you mean text_encoder\?"),
        ({"dwn": 0.5}, r"'dwn'.*did you mean .*down"),
        (
            {"unet": {"down": {"block_9": 1}}},
            r"unknown key 'block_9' in the weights of rex\.unet\.down.*block_",
        ),
        (
            {"unet": {"up": {"block_1": [1, 2, 3, 4, 5]}}},
            r"5 weights for rex\.unet.* give a list of 2",
        ),
        ({"down": float("nan")}, r"the weight of rex\.down is nan"),
        ({"mid": "1"}, r"the weight of rex\.mid is '1'"),
        ({"text_encoder_3": {}}, "'text_encoder_3'"),
        ("much", "the weight of rex is 'much'"),
        (None, "the weight of rex is None"),
    ],
)
def test_unknown_keys_are_refused_with_suggestions(weight, message, tmp_path):
    pipe = tiny_sd()
    file = lora(pipe, tmp_path / "rex.safetensors")
    before = everything(pipe)
    with pytest.raises(ConfigError, match=message):
        pipe.load_custom(file, weights={"rex": weight})
    assert_same(everything(pipe), before)


def test_weights_of_unchanged_layers_warn(tmp_path):
    pipe = tiny_sd()
    file = lora(pipe, tmp_path / "rex.safetensors")
    less = part(file, lambda key: "text_encoder" not in key)
    with pytest.warns(UserWarning, match="part changes no layer of text_encoder"):
        pipe.load_custom(less, weights=[{"text_encoder": 0.5}])


def test_all_zero_weights_draw_the_base(tmp_path):
    pipe = tiny_sd()
    picture = draw(pipe)
    file = lora(pipe, tmp_path / "rex.safetensors")
    for fuse in (False, True):
        pipe.load_custom(file, weights=[{"unet": 0, "text_encoder": 0}], fuse=fuse)
        assert (draw(pipe) == picture).all()
        pipe.load_custom(weights={"rex": {"text_encoder": 0}})
        assert (draw(pipe) != picture).any()
        pipe.unload_custom()
    assert_same(everything(pipe), everything(tiny_sd()))


def test_modular_steps_accept_component_weights(tmp_path):
    pipe = tiny_sdxl()
    file = lora(pipe, tmp_path / "rex.safetensors")
    weights = {"rex": {"text_encoder": 0.5, "down": 0.2}}
    blocks = modular(pipe).blocks
    blocks.sub_blocks.insert("concepts", ConceptsStep(), 0)
    made = blocks.init_pipeline()
    parts = {k: v for k, v in tiny_sdxl().components.items() if v is not None}
    made.update_components(**{k: v for k, v in parts.items() if k in made.components})
    call = {"prompt": "a dog", "num_inference_steps": 1, "height": 32, "width": 32}
    made(**call, concepts=[file], concept_weights=weights, output="images")
    assert repr(made.custom).count("text_encoder 0.5, down 0.2, else 1") == 1
    assert isinstance(pipe, DiffusionPipeline)

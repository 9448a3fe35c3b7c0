"""Weights by component and block, and merges with a weight of 0."""

import pytest
import torch

from customize.concepts.input_statistics import LayerInputs
from customize.concepts.merge.component_weights import BlockWeights, layer_weight, parse_weight
from customize.concepts.merge.merge_concepts import merge_concepts
from customize.concepts.types import Lora, LoraInfo
from customize.core.lowrank import LowRank, to_dense
from customize.errors import ConfigError

UNET = [
    *(
        f"{side}_blocks.{n}.{kind}.{i}.{leaf}"
        for side, count in (("down", 2), ("up", 3))
        for n in range(2)
        for i in range(count)
        for kind, leaf in (("attentions", "proj_in"), ("resnets", "conv1"))
        if not (side == "down" and n == 1 and kind == "attentions")
    ),
    "down_blocks.0.downsamplers.0.conv",
    "mid_block.attentions.0.proj_in",
    "mid_block.resnets.0.conv1",
    "mid_block.resnets.1.conv1",
    "time_embedding.linear_1",
]
LAYERS = {
    "unet": UNET,
    "text_encoder": ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.q_proj"],
}


def weight_of_layer(weight, component, module):
    return layer_weight(parse_weight("rex", weight, LAYERS, ["unet"]), component, module)


@pytest.mark.parametrize(
    ("weight", "layer", "expected"),
    [
        (0.5, "time_embedding.linear_1", 0.5),
        ({"down": 0.5}, "time_embedding.linear_1", 1.0),
        ({"unet": 0.2, "down": 0.5}, "time_embedding.linear_1", 0.2),
        ({"unet": 0.2, "down": 0.5}, "down_blocks.1.resnets.0.conv1", 0.5),
        ({"down": 0.5, "unet": 0.2}, "down_blocks.1.resnets.0.conv1", 0.5),
        ({"unet": {"down": {"block_0": 0.5}}}, "down_blocks.0.attentions.1.proj_in", 0.5),
        ({"unet": {"down": {"block_0": 0.5}}}, "down_blocks.1.resnets.0.conv1", 1.0),
        ({"unet": {"down": {"block_0": [0.5, 0.7]}}}, "down_blocks.0.attentions.1.proj_in", 0.7),
        ({"unet": {"down": {"block_0": [0.5, 0.7]}}}, "down_blocks.0.resnets.1.conv1", 0.7),
        ({"unet": {"down": {"block_0": [0.5, 0.7]}}}, "down_blocks.0.downsamplers.0.conv", 0.5),
        ({"down": [0.5, 0.7]}, "down_blocks.1.resnets.1.conv1", 0.7),
        ({"up": {"block_1": [0.4, 0.8, 1.0]}}, "up_blocks.1.attentions.2.proj_in", 1.0),
        ({"up": {"block_1": [0.4]}}, "up_blocks.1.attentions.2.proj_in", 0.4),
        ({"mid": [0.3]}, "mid_block.resnets.1.conv1", 0.3),
        ({"": 0.3, "down": 0.5}, "mid_block.resnets.1.conv1", 0.3),
        ({"unet": {"": 0.3, "down": 0.5}}, "mid_block.resnets.1.conv1", 0.3),
        ({"up_blocks.1.attentions.0": 0}, "up_blocks.1.attentions.0.proj_in", 0.0),
        ({"up_blocks.1": 0}, "up_blocks.1.attentions.0.proj_in", 0.0),
    ],
)
def test_weights_of_unet_layers(weight, layer, expected):
    assert weight_of_layer(weight, "unet", layer) == expected


def test_text_encoder_layers_by_both_names():
    weight = {"text_encoder": {"layers": [0.2, 0.4]}}
    for name in ("encoder.layers.1.self_attn.q_proj", "text_model.encoder.layers.1.self_attn.q"):
        assert weight_of_layer(weight, "text_encoder", name) == 0.4
    assert (
        weight_of_layer(
            {"text_encoder": {"layers": {"block_0": 0}}}, "text_encoder", "encoder.layers.0.x"
        )
        == 0
    )


def test_block_1_does_not_match_block_10():
    layers = {"transformer": [f"blocks.{n}.to_q" for n in range(12)]}
    weight = parse_weight("rex", {"blocks": {"block_1": 0.5}}, layers, ["transformer"])
    assert [weight.for_layer("transformer", f"blocks.{n}.to_q") for n in (1, 10, 11)] == [
        0.5,
        1.0,
        1.0,
    ]
    weights = parse_weight("rex", {"blocks": [0.1 * n for n in range(12)]}, layers, ["transformer"])
    assert weights.for_layer("transformer", "blocks.10.to_q") == 1.0


def test_blocks_of_two_denoisers():
    layers = {key: ["blocks.0.to_q"] for key in ("transformer", "transformer_2")}
    weight = parse_weight("rex", {"blocks": 0.5, "transformer_2": 0.2}, layers, [*layers])
    assert weight.for_layer("transformer", "blocks.0.to_q") == 0.5
    other = parse_weight("rex", {"transformer_2": {"blocks": 0.2}}, layers, [*layers])
    assert other.for_layer("transformer", "blocks.0.to_q") == 1.0


@pytest.mark.parametrize(
    "weight", [{"unet": {"time_embedding": [1, 2]}}, {"mid": [1, 2]}, {"x": 1}]
)
def test_invalid_weights_are_refused(weight):
    with pytest.raises(ConfigError):
        parse_weight("rex", weight, LAYERS, ["unet"])


def lora(name, seed, layers=("a", "b")):
    g = torch.Generator().manual_seed(seed)
    products = {
        "unet": {
            m: LowRank(torch.randn(6, 2, generator=g), torch.randn(2, 5, generator=g)) for m in "ab"
        }
    }
    products = {"unet": {m: products["unet"][m] for m in layers}}
    return Lora(LoraInfo(name, "sd", "", 2), products)


@pytest.mark.parametrize("method", ["sum", "average", "magnitude", "dare", "ties", "fusion"])
def test_layer_of_weight_0_counts_as_unchanged(method):
    g = torch.Generator().manual_seed(5)
    rows = [{"unet": {m: torch.randn(9, 5, generator=g) for m in "ab"}} for _ in range(4)]
    inputs = [LayerInputs("", rows[0], rows[1]), LayerInputs("", rows[2], rows[3])]
    arguments = {"inputs": inputs} if method == "fusion" else {}
    tom, weight = lora("tom", 2), BlockWeights((("unet.b", 0.0), ("unet", 0.7)), "")
    actual = merge_concepts([lora("rex", 1), tom], [weight, 0.6], method, **arguments)
    expected = merge_concepts([lora("rex", 1, "a"), tom], [0.7, 0.6], method, **arguments)
    for module in "ab":
        torch.testing.assert_close(
            to_dense(actual["unet"][module]), to_dense(expected["unet"][module])
        )
    assert merge_concepts([lora("rex", 1)], [BlockWeights((("unet", 0.0),), "")]) == {}


@pytest.mark.parametrize(
    ("weight", "layer", "expected"),
    [
        ({"down.block_0": 0.5}, "down_blocks.0.attentions.1.proj_in", 0.5),
        ({"down.block_0": 0.5}, "down_blocks.1.resnets.0.conv1", 1.0),
        ({"unet.down.block_1": 0.5}, "down_blocks.1.resnets.0.conv1", 0.5),
        ({"unet.down.block_0.attentions": 0.5}, "down_blocks.0.attentions.1.proj_in", 0.5),
        ({"unet.down.block_0.attentions": 0.5}, "down_blocks.0.resnets.1.conv1", 1.0),
        # The default of a dict may come before its other keys.
        ({"unet": {"": 0.3, "down": 0.5}}, "down_blocks.1.resnets.0.conv1", 0.5),
        ({"": 0.3, "unet": 0.5}, "down_blocks.1.resnets.0.conv1", 0.5),
        # Where there are more residual layers than attentions, the last weight goes on.
        ({"up": {"block_0": [0.4, 0.8]}}, "up_blocks.0.resnets.2.conv1", 0.8),
    ],
)
def test_keys_joined_with_dots_and_defaults(weight, layer, expected):
    names = [name for name in UNET if name != "up_blocks.0.attentions.2.proj_in"]
    parsed = parse_weight("rex", weight, {**LAYERS, "unet": names}, ["unet"])
    assert layer_weight(parsed, "unet", layer) == expected


@pytest.mark.parametrize(
    ("weight", "where", "suggestion"),
    [
        ({"dwn": 0.5}, "'dwn' in the weights of rex:", "down"),
        ({"down": {"blok_0": 0.5}}, "'blok_0' in the weights of rex.down:", "block_0"),
        ({"unet": {"midd": 0.5}}, "'midd' in the weights of rex.unet:", "mid"),
        ({"down": {"block_0": {"atentions": 1}}}, "weights of rex.down.block_0:", "attentions"),
        ({"down.block_7": 0.5}, "'down.block_7' in the weights of rex:", ""),
        ({"no.block_0": 0.5}, "'no.block_0' in the weights of rex:", ""),
    ],
)
def test_unknown_keys_are_named_with_the_nearest_one(weight, where, suggestion):
    with pytest.raises(ConfigError) as caught:
        parse_weight("rex", weight, LAYERS, ["unet"])
    assert caught.value.where == "weights"
    assert where in caught.value.problem and suggestion in caught.value.fix


@pytest.mark.parametrize(
    ("weight", "where"),
    [
        ({"": "x"}, "the weight of rex is"),
        ({"down": "x"}, "the weight of rex.down is"),
        ({"down": {"": "x"}}, "the weight of rex.down is"),
        ({"down": {"block_0": "x"}}, "the weight of rex.down.block_0 is"),
        ({"up": {"block_1": [0.4, "x", 1.0]}}, "the weight of rex.up.block_1 is"),
        ({"up": [0.4, 0.5]}, "2 weights for rex.up, which has 3 blocks"),
    ],
)
def test_invalid_numbers_are_named_by_their_keys(weight, where):
    with pytest.raises(ConfigError, match=where):
        parse_weight("rex", weight, LAYERS, ["unet"])


def test_weights_are_shown_as_they_were_given():
    weight = {"": 0.3, "unet": {"": 0.2, "down": {"block_0": [0.5, 0.7]}}, "text_encoder": 0}
    parsed = parse_weight("rex", weight, LAYERS, ["unet"])
    assert f"{parsed}" == "unet 0.2, unet.down.block_0 0.5/0.7, text_encoder 0, else 0.3"
    # The modules of a list are no keys of the dict.
    assert parsed.keys == ("", "unet", "unet.down_blocks.0", "text_encoder")
    assert parse_weight("rex", {"up": [0.5]}, LAYERS, ["unet"]).keys == ("unet.up_blocks",)


def test_short_names_are_those_of_a_unet():
    layers = {
        "transformer": ["mid.to_q", "block_0.to_q", "encoder.layers.0.to_q"],
        "text_encoder": [
            "text_model.encoder.layers.0.q_proj",
            "text_model.encoder.layers.1.q_proj",
        ],
    }

    def parse(weight):
        return parse_weight("rex", weight, layers, ["transformer"])

    assert parse({"mid": 0.5}).for_layer("transformer", "mid.to_q") == 0.5
    assert parse({"block_0": 0.5}).for_layer("transformer", "block_0.to_q") == 0.5
    # Only a text encoder's blocks may be named without its encoder.
    with pytest.raises(ConfigError, match="unknown key 'layers'"):
        parse({"layers": 0.5})
    weight = parse({"text_encoder": {"layers": [0.2, 0.4]}})
    for prefix in ("", "text_model."):
        assert weight.for_layer("text_encoder", f"{prefix}encoder.layers.1.q_proj") == 0.4

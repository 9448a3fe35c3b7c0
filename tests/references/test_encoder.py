"""The encoder of reference images, on a small random Qwen2-VL."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from customize.errors import ConfigError
from customize.references.config import ReferencesConfig
from customize.references.encoder import MLLMS, ReferenceEncoder
from customize.references.encoder_inputs import GroupRequest
from tests.references.tiny_mllm import tiny_encoder, tiny_mllm, tiny_processor

PROCESSOR = tiny_processor()


def make_images(count: int, seed: int = 0, side: int = 40) -> list[Image.Image]:
    """Random images."""
    rng = np.random.default_rng(seed)
    return [
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)
    ]


@pytest.mark.parametrize("kind", MLLMS)
@pytest.mark.parametrize("positions", ["running", "image_grid"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@torch.no_grad()
def test_group_has_same_tokens_alone_and_in_a_padded_batch(kind, positions, attention):
    encoder = tiny_encoder(kind=kind, positions=positions, attention=attention)
    groups = [
        GroupRequest(make_images(3), prompt="a dog"),
        GroupRequest(make_images(1, 1, 64), prompt="a cat on a beach"),
        GroupRequest(make_images(2, 2), ["colour", ""], "x"),
    ]
    together = encoder(PROCESSOR.make_inputs(groups, encoder.config))
    assert together.shape == (3, 4, 32)
    for row, group in enumerate(groups):
        alone = encoder(PROCESSOR.make_inputs([group], encoder.config))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@torch.no_grad()
def test_attention_among_reference_tokens(attention):
    encoder = tiny_encoder(attention=attention)
    inputs = PROCESSOR.make_inputs([GroupRequest(make_images(2))], encoder.config)
    before = encoder(inputs)
    encoder.final_layer.reference_tokens.data[-1] += 1.0
    changes = (encoder(inputs) - before).abs().amax(dim=(0, 2))
    assert changes[-1] > 1e-3
    if attention == "causal":
        assert changes[:-1].max() == 0
    else:
        assert changes[:-1].min() > 1e-6


@torch.no_grad()
def test_every_image_and_attribute_changes_the_tokens():
    encoder = tiny_encoder()
    images, others = make_images(3), make_images(3, 1)

    def encode(images, attributes=()):
        request = GroupRequest(images, attributes)
        return encoder(PROCESSOR.make_inputs([request], encoder.config))

    before = encode(images)
    for position in range(3):
        changed = [*images]
        changed[position] = others[position]
        assert (encode(changed) - before).abs().max() > 1e-4
        attributes = [""] * 3
        attributes[position] = "colour"
        assert (encode(images, attributes) - before).abs().max() > 1e-4


@torch.no_grad()
def test_weight_of_an_image():
    encoder = tiny_encoder()
    inputs = PROCESSOR.make_inputs([GroupRequest(make_images(2))], encoder.config)
    plain = encoder(inputs)
    torch.testing.assert_close(encoder(inputs, torch.ones(1, 2)), plain)
    # Hiding both images leaves the text, so the images' content cannot matter in the final layer.
    states = encoder.read_images(inputs)
    hidden = encoder.read_tokens(states, inputs, torch.zeros(1, 2))
    noise = torch.where((inputs.image_index >= 0)[..., None], torch.randn_like(states), states)
    torch.testing.assert_close(encoder.read_tokens(noise, inputs, torch.zeros(1, 2)), hidden)
    assert (hidden - plain).abs().max() > 1e-4


def test_image_grid_positions():
    encoder = tiny_encoder(positions="image_grid", instruction="x", includes_prompt=False)
    inputs = PROCESSOR.make_inputs([GroupRequest(make_images(2, side=32))], encoder.config)
    index, positions = inputs.image_index[0], inputs.position_ids[:, 0]
    first = positions[:, index == 0]
    start = int(first[0, 0])
    assert first.sub(start).tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]]
    # 2 x 2 tokens take two positions; <|vision_end|> and <|vision_start|> are between the images.
    assert int(positions[0, index == 1][0]) == start + 2 + 2
    assert int(inputs.next_position[0]) == int(positions.max()) + 1


@pytest.mark.parametrize("kind", MLLMS)
@torch.no_grad()
def test_states_are_those_of_the_whole_mllm_without_its_last_layer(kind):
    """The states before the final layer equal transformers' own, with the same positions."""
    encoder = tiny_encoder(kind=kind, positions="image_grid")
    inputs = PROCESSOR.make_inputs([GroupRequest(make_images(2, side=64))], encoder.config)
    mllm = tiny_mllm(kind)
    del mllm.language_model.layers[-1]
    mllm.config.image_token_id = PROCESSOR.image_token_id
    expected = mllm(
        input_ids=inputs.input_ids,
        pixel_values=inputs.pixel_values,
        image_grid_thw=inputs.image_grid_thw,
        mm_token_type_ids=(inputs.image_index >= 0).int(),
        attention_mask=torch.ones_like(inputs.input_ids),
        use_cache=False,
    ).last_hidden_state
    torch.testing.assert_close(encoder.read_images(inputs), expected, rtol=1e-4, atol=1e-5)


def test_unsuitable_mllms_are_refused():
    config = ReferencesConfig(family="sd", width=32)
    other = tiny_mllm()
    other.config.model_type = "llava"
    with pytest.raises(ConfigError, match="'llava' cannot read references"):
        ReferenceEncoder(config, other)
    with pytest.raises(ConfigError, match="2 decoder layers, and needs at least 3"):
        ReferenceEncoder(config, tiny_mllm("qwen3_vl", layers=2))
    sliding = tiny_mllm()
    sliding.config.text_config.use_sliding_window = True
    with pytest.raises(ConfigError, match="sliding-window"):
        ReferenceEncoder(config, sliding)


@pytest.mark.parametrize("kind", MLLMS)
def test_all_parts_get_gradients(kind):
    encoder = tiny_encoder(kind=kind)
    encoder(PROCESSOR.make_inputs([GroupRequest(make_images(2))], encoder.config)).sum().backward()
    without = [name for name, p in encoder.named_parameters() if p.grad is None]
    assert without == []

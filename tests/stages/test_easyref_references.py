"""Drawing with EasyRef's weights in a single file, from its name to the picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import customize
from customize.errors import ConceptError, ConfigError, PipelineError
from tests.references.test_encoder import make_images
from tests.references.tiny_easyref import write_release
from tests.tiny import tiny_sd


@pytest.fixture
def release(tmp_path, monkeypatch):
    return write_release(tmp_path, monkeypatch)


def draw(pipe, prompt="a dog on the beach", **call):
    settings = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    noise = torch.Generator().manual_seed(1)
    return pipe(prompt=prompt, generator=noise, **settings | call).images


def test_weights_of_the_release_draw(release):
    pipe, path, mllm = release
    base = draw(pipe)
    references = customize.References.from_pretrained(path, mllm=mllm)
    pipe.load_custom(references)
    assert np.array_equal(draw(pipe), base)
    first, second = make_images(2), make_images(2, 1)
    with_first = draw(pipe, reference_images=first)
    assert np.abs(with_first - base).max() > 1e-3
    assert np.abs(draw(pipe, reference_images=second) - with_first).max() > 1e-4
    # The prompt is read with the images, so the same images give other tokens with another one.
    tokens = [references.encode(first, prompt).tokens for prompt in ("a dog", "a cat")]
    assert (tokens[0] - tokens[1]).abs().max() > 1e-3
    pipe.unload_custom()
    assert np.array_equal(draw(pipe), base)


def test_weights_of_the_release_are_saved_as_a_folder(release, tmp_path):
    _, path, mllm = release
    references = customize.References.from_pretrained(path, mllm=mllm)
    references.model.save_pretrained(tmp_path / "model")
    again = customize.References.from_pretrained(tmp_path / "model")
    images = make_images(3)
    expected = references.encode(images, "a dog").tokens
    torch.testing.assert_close(again.encode(images, "a dog").tokens, expected)


def test_unsuitable_weights_leave_the_pipeline_alone(release, tmp_path):
    pipe, path, mllm = release
    base = draw(pipe)
    with pytest.raises(ConfigError, match="come without the configuration"):
        customize.References.from_pretrained(path)
    with pytest.raises(ConceptError, match="pickle"):
        customize.References.from_pretrained(tmp_path / "easyref.pt", mllm=mllm)
    with pytest.raises(ConfigError, match="belong to EasyRef's file"):
        customize.References.from_pretrained(mllm, mllm=mllm)
    references = customize.References.from_pretrained(path, mllm=mllm)
    with pytest.raises(PipelineError, match="family sdxl"):
        tiny_sd().load_custom(references)
    assert np.array_equal(draw(pipe), base)

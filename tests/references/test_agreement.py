"""Agreement of the images of a group."""

from __future__ import annotations

import warnings

import pytest
import torch

from customize.references.agreement import KEEP, OUTLIER, POWER, measure_agreement, weigh
from customize.references.encoder_inputs import GroupRequest
from customize.references.model import ReferenceModel
from customize.storybook.example_concepts import make_concept
from tests.references.test_encoder import make_images
from tests.references.tiny_mllm import tiny_encoder, tiny_processor


def test_weights_follow_the_formula():
    result = weigh(torch.tensor([0.8, 0.8, KEEP * 0.8, 0.2, 0.0]))
    assert result.agreement == pytest.approx((0.8, 0.8, KEEP * 0.8, 0.2, 0.0))
    median = 0.8 * KEEP
    expected = [1.0, 1.0, 1.0, (0.2 / (KEEP * median)) ** POWER, 0.0]
    assert result.weights == pytest.approx(expected)
    assert result.outliers == tuple(
        n for n, a in enumerate(result.agreement) if a < OUTLIER * median
    )


def test_pairs_and_groups_without_agreement_are_not_weighed():
    assert weigh(torch.tensor([0.9, 0.1])).weights == (1.0, 1.0)
    assert weigh(torch.zeros(4)).weights == (1.0,) * 4


@torch.no_grad()
def test_an_outlier_agrees_least():
    encoder, processor = tiny_encoder(), tiny_processor()
    same, other = make_images(1)[0], make_images(1, 5)[0]
    inputs = processor.make_inputs([GroupRequest([same, same, other, same])], encoder.config)
    states = encoder.read_images(inputs)
    result = measure_agreement(encoder, states, inputs, 4)
    assert min(range(4), key=result.agreement.__getitem__) == 2
    # The tokens of image 0 alone do not depend on the others in the final layer.
    own = encoder.read_tokens(states, inputs, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    noise = torch.where((inputs.image_index > 0)[..., None], torch.randn_like(states), states)
    torch.testing.assert_close(
        encoder.read_tokens(noise, inputs, torch.tensor([[1.0, 0.0, 0.0, 0.0]])), own
    )


def test_one_image_agrees_with_itself():
    result = measure_agreement(None, torch.zeros(1), None, 1)
    assert (result.agreement, result.weights, result.outliers) == ((1.0,), (1.0,), ())


def test_outliers_are_found_by_the_bundled_model():
    model = ReferenceModel.from_pretrained("assets/references")
    images = make_concept("rex", "dog", 5001, 6).images()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        honest = model.encode(images)
    assert min(honest.weights) > 0.5
    images[2] = make_concept("other", "dog", 5004, 1).images()[0]
    mixed = model.encode(images)
    assert min(range(6), key=mixed.weights.__getitem__) == 2
    assert mixed.weights[2] < 0.3

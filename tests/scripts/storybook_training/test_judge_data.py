"""Training data of the judges: labels, degraded images, crops."""

from __future__ import annotations

import numpy as np
import torch

from customize.storybook.bundled_models import make_vae
from customize.storybook.judges import HEADS, judge_inputs
from customize.storybook.scene_drawing import draw_scene
from customize.storybook.world import random_scene
from scripts.storybook_training.judge_data import identity_views, labels, roughen
from tests.storybook.making import random_scenes


def test_labels_are_those_of_the_scene():
    scene = random_scenes(1, 1)[0]
    actual = labels(scene)
    thing = scene.things[0]
    assert HEADS["count"][actual["count"]] == "one"
    assert HEADS["place"][actual["place"]] == scene.background
    assert HEADS["kind0"][actual["kind0"]] == thing.identity.kind
    assert HEADS["accessory0"][actual["accessory0"]] == thing.accessory
    assert {actual[name] for name in HEADS if name.endswith("1")} == {-1}
    assert actual.keys() == HEADS.keys()


def test_degraded_images_keep_shape_and_range():
    images = judge_inputs([draw_scene(s) for s in random_scenes(6, 1)])
    rough = roughen(images, torch.Generator().manual_seed(1), None)
    assert rough.shape == images.shape
    assert rough.abs().max() <= 1
    assert not torch.equal(rough, images)
    assert torch.equal(rough, roughen(images, torch.Generator().manual_seed(1), None))


def test_views_of_an_identity_cover_all_classes():
    crops, kinds = identity_views(np.random.default_rng(0), 8, 4)
    assert crops.shape == (8, 4, 3, 64, 64)
    assert crops.dtype == torch.uint8
    assert set(kinds) == set(HEADS["kind0"])


def test_random_scenes_have_valid_labels():
    rng = np.random.default_rng(5)
    for _ in range(50):
        scene = random_scene(rng, two=0.5)
        for name, index in labels(scene).items():
            assert -1 <= index < len(HEADS[name])


def test_a_third_of_the_images_is_encoded_and_decoded():
    torch.manual_seed(0)
    vae = make_vae().eval()
    images = judge_inputs([draw_scene(s) for s in random_scenes(6, 1)])
    rough = roughen(images, torch.Generator().manual_seed(1), vae)
    assert rough.shape == images.shape
    assert not rough.requires_grad
    drawn = [(a - b).abs().mean().item() for a, b in zip(images, rough, strict=True)]
    # An untrained autoencoder leaves nothing of an image.
    assert min(drawn[:2]) > max(drawn[2:])
    # Less than three images have no third.
    few = roughen(images[:2], torch.Generator().manual_seed(1), vae)
    assert torch.equal(few, roughen(images[:2], torch.Generator().manual_seed(1), None))

"""What the trainer draws and captions: the storybook's scenes are those it always had."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from scripts.storybook_training.worlds import STORYBOOK

# Digests of 200 scenes and of their captions, as the bundled base was trained on.
SCENES = {
    64: "ca0cf1f9bacb61248b44a0a0e0ac08519ad6586d3d5aed4432e3c2224fb88d2b",
    96: "1dc500d311a3f8d8fe1bccf5aad93668f547fb06f2657c5a0e6a872fb83d641a",
    128: "fc1fe1378bf6b47c1b9c3b711aaa21b641528f50cc48527648c79e476f945af3",
}
CAPTIONS = {
    64: "7c07e39c15cce3d3365bb988a41f0ae2c0f02cc964b64c1538869a96398220ce",
    96: "77361dfd72dce8d09ca4a6f7fb72f64474a5d45d8289417916e75743d075fe74",
    128: "77361dfd72dce8d09ca4a6f7fb72f64474a5d45d8289417916e75743d075fe74",
}
TOKENS = "40b88647938eb7b4388b7a3c025f34f60085ea93b57b5ac64276e71063479fa6"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("width", [64, 96, 128])
def test_the_storybooks_scenes_and_captions_stay_the_same(width):
    scenes = [STORYBOOK.training_scene(0, index, 0.3, width) for index in range(200)]
    assert digest("\n".join(map(repr, scenes))) == SCENES[width]
    captions = [STORYBOOK.caption(s, np.random.default_rng(k)) for k, s in enumerate(scenes)]
    assert digest("\n".join(captions)) == CAPTIONS[width]


def test_the_storybooks_tokens_stay_the_same():
    assert digest(repr(sorted(STORYBOOK.make_tokenizer().get_vocab().items()))) == TOKENS


def test_scenes_depend_on_seed_and_index_only():
    assert STORYBOOK.training_scene(1, 5) == STORYBOOK.training_scene(1, 5)
    scenes = {STORYBOOK.training_scene(1, k) for k in range(20)}
    assert len(scenes | {STORYBOOK.training_scene(2, 5)}) == 21


def test_the_share_of_scenes_with_two_things_is_a_setting():
    counts = [len(STORYBOOK.training_scene(1, k, two=1.0).things) for k in range(20)]
    assert set(counts) == {2}
    wide = [STORYBOOK.training_scene(1, k, width=128) for k in range(60)]
    assert {scene.width for scene in wide} == {128}
    assert {len(scene.things) for scene in wide} == {1, 2, 3}

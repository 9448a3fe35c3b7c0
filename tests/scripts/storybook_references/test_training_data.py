"""Training data of the bundled references: images, questions, attributes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from customize.evaluation.storybook_rates import SCENES
from customize.references.model_files import read_config
from customize.storybook.caption_grammar import WORDS, parse_prompt
from customize.storybook.world import random_identity
from storybook_references.attribute_groups import AttributeGroups, make_attribute_group, transfer
from storybook_references.captions import class_caption
from storybook_references.mllm import ATTRIBUTES, CONFIG, make_processor
from storybook_references.pretrain_mllm import make_batch
from storybook_references.pretrain_vision import make_targets
from storybook_references.questions import (
    attribute_words,
    groups_by_class,
    identity_words,
    make_question,
)
from storybook_references.render_groups import IMAGES, Groups, patches, render_groups
from storybook_references.train_stages import Data, make_sample


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Groups:
    return render_groups(tmp_path_factory.mktemp("groups"), 12, workers=1)


def test_groups_are_drawn_once_and_never_in_scenes_of_the_benchmarks(groups, tmp_path):
    render_groups(tmp_path, 3, workers=1)
    again = render_groups(tmp_path, 3, workers=1)
    np.testing.assert_array_equal(again.pixels, groups.pixels[:3])
    assert again.identities == groups.identities[:3]
    shown = {
        scene
        for pair in zip(groups.backgrounds, groups.accessories, strict=True)
        for scene in zip(*pair, strict=True)
    }
    assert len(shown) > 10
    assert shown.isdisjoint(SCENES)


def test_patches_are_those_of_the_image_processor(groups):
    image = groups.pixels[2, 1]
    processed = make_processor().image_processor(
        images=[Image.fromarray(image)], return_tensors="pt"
    )
    torch.testing.assert_close(patches(image[None]), processed["pixel_values"])
    assert processed["image_grid_thw"].tolist() == [[1, 8, 8]]


def test_every_word_is_one_token_alone_and_behind_a_space():
    tokenizer = make_processor().tokenizer
    for word in (*WORDS, *ATTRIBUTES, "images", "striped", "mark"):
        assert len(tokenizer(word).input_ids) == 1
        assert len(tokenizer(f"a {word}").input_ids) == 2
    text = "a dog <|vision_start|><|image_pad|><|vision_end|>odd 123"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_labels_are_the_answers_next_tokens(groups):
    processor = make_processor()
    rng = np.random.default_rng(0)
    members = groups_by_class(groups)
    questions = [make_question(groups, members, rng) for _ in range(40)]
    assert len({question.text for question in questions}) == 4
    inputs, labels = make_batch(processor, groups, questions)
    for row, question in enumerate(questions):
        answer = processor.tokenizer.decode(labels[row][labels[row] >= 0])
        assert answer == question.answer + "<|im_end|>"
        assert int(inputs.image_index[row].max()) + 1 == len(question.images)
    assert int((inputs.image_index >= 0).sum()) == 16 * len(inputs.image_grid_thw)


def test_answers_tell_identities_apart_and_attributes_are_parts_of_them(groups):
    words = [identity_words(identity) for identity in groups.identities]
    assert len(set(words)) == len(words)
    for attribute in ("colour", "pattern", "shape"):
        assert attribute_words(groups, 3, 2, attribute) in words[3]
    assert attribute_words(groups, 3, 2, "background").strip() == groups.backgrounds[3][2]


def test_targets_have_values_where_they_are_visible(groups):
    targets = make_targets(groups)
    assert targets.labels.shape == (12, IMAGES, 4)
    assert targets.values.shape == targets.masks.shape == (12, 26)
    assert targets.values.abs().max() <= 1.01
    for identity, mask in zip(groups.identities, targets.masks, strict=True):
        visible = {"plain": 0, "striped": 6, "spotted": 2}[identity.pattern]
        assert int(mask[17:].sum()) == visible


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_an_attribute_alone_is_transferred(attribute):
    rng = np.random.default_rng(3)
    target, source = random_identity(rng, "cat"), random_identity(rng, "cat", pattern="spotted")
    mixed = transfer(target, source, attribute)
    parts = {
        "colour": {"body", "accent", "mark", "eye"},
        "pattern": {"pattern", "mark_seed"},
        "shape": {"width", "height", "head", "ear", "eye_size"},
    }.get(attribute, set())
    for name, value in vars(mixed).items():
        assert value == getattr(source if name in parts else target, name)


def test_captions_leave_out_what_references_give():
    for index in range(20):
        names, caption, images = make_attribute_group(index)
        request = parse_prompt(caption)
        assert 1 <= len(names) <= 3
        assert images.shape == (4, 64, 64, 3)
        assert [bool(image.any()) for image in images[1:]] == [k < len(names) for k in range(3)]
        assert request.things[0].kind is not None
        assert (request.background is None) == ("background" in names)
        assert (request.things[0].colour, request.things[0].pattern) == (None, None)
    assert class_caption("dog", "none", "snow") == "a photo of a dog in the snow"


def test_the_bundled_references_have_the_configuration_of_their_training():
    assert read_config(Path("assets/references")) == CONFIG
    assert CONFIG.attributes == ATTRIBUTES


def test_a_target_is_never_among_its_references(groups):
    one = Groups(groups.pixels[:1], groups.identities[:1], groups.accessories, groups.backgrounds)
    latents = np.arange(IMAGES).reshape(1, IMAGES)  # the number of the image in place of its own
    no_attributes = AttributeGroups(np.zeros((0, 1)), [], [])
    data = Data(one, latents, no_attributes, np.zeros((0, 1)))
    # Outliers are of the same class, here all of the target's own group.
    members = {one.identities[0].kind: [0]}

    count = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        if np.random.default_rng(seed).random() < 0.25:  # a sample of attributes
            continue
        sample = make_sample(data, members, "multi", 4, rng)
        target = one.pixels[0, int(sample.latents)]
        assert not any(np.array_equal(target, image) for image in sample.references)
        count += 1
    assert count > 100

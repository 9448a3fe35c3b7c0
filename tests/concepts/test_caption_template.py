"""The caption that other texts are made of, from files that may be anyone's."""

from __future__ import annotations

import pytest

from customize.concepts.caption_template import DEFAULT_CAPTION, caption_template, prefix_of
from customize.training.config import TrainConfig


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({}, DEFAULT_CAPTION),
        ({"settings": {"caption": "a sticker of {}"}}, "a sticker of {}"),
        ({"settings": {"caption": " a sticker\n of {} "}}, "a sticker of {}"),
        ({"settings": {"caption": None}}, DEFAULT_CAPTION),
        ({"settings": {"caption": "a sticker"}}, DEFAULT_CAPTION),
        ({"settings": {"caption": "{} and {}"}}, DEFAULT_CAPTION),
        ({"settings": {"caption": "{}" + "very " * 40}}, DEFAULT_CAPTION),
        ({"settings": {"caption": 3}}, DEFAULT_CAPTION),
        ({"settings": ["caption"]}, DEFAULT_CAPTION),
    ],
)
def test_files_without_a_usable_caption_have_the_default(training, expected):
    assert caption_template(training) == expected


def test_what_stands_before_a_concept():
    assert prefix_of("a sticker of {} on a table") == "a sticker of "
    assert prefix_of("{}, a sticker") == "a photo of "


def test_the_default_is_that_of_training():
    assert TrainConfig.model_fields["caption"].default == DEFAULT_CAPTION

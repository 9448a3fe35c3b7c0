"""Which subjects are common, and what is held out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from customize.errors import ConfigError, DataError
from customize.stickers.artwork import Subject
from customize.stickers.subjects import (
    COMMON,
    UNCOMMON_SUBGROUPS,
    common_subjects,
    head_noun,
    training_split,
)
from tests.stickers.making import SUBJECTS


def subject(name, group="food-drink", subgroup="food-fruit", version=1.0, code=None):
    return Subject(code or name.replace(" ", "-"), name, (), (), group, subgroup, version)


def names(subjects):
    return [each.name for each in subjects]


@pytest.mark.parametrize(
    ("name", "group", "noun"),
    [
        ("red apple", "food-drink", "apple"),
        ("grapes", "food-drink", "grape"),
        ("glass of milk", "food-drink", "glass"),
        ("cloud with lightning and rain", "travel-places", "cloud"),
        ("tiger face", "animals-nature", "tiger"),
        ("grinning face", "smileys-emotion", "face"),
        ("cactus", "animals-nature", "cactus"),
        ("pizza", "food-drink", "pizza"),
    ],
)
def test_head_nouns(name, group, noun):
    assert head_noun(subject(name, group)) == noun


def test_of_subjects_about_one_noun_the_first_is_common():
    apples = [subject("green apple", version=2), subject("red apple"), subject("apple", version=3)]
    assert names(common_subjects(apples)) == ["apple"]
    assert names(common_subjects(apples[:2])) == ["red apple"]


def test_common_subjects_keep_their_order_within_the_sizes_of_groups():
    many = [subject(f"fruit{'abcdefghij'[k % 10]}{'abcdefghij'[k // 10]}") for k in range(100)]
    signs = [subject("clock", "travel-places", "time"), subject("heart", "symbols", "heart")]
    common = common_subjects([*signs, *many])
    assert names(common) == names(many[: COMMON["food-drink"]])
    assert "time" in UNCOMMON_SUBGROUPS


def test_the_split_of_the_shapes(artwork):
    split = training_split(artwork)
    assert names(split.held_out) == ["snail", "grapes"]
    assert split.hands == ("crayon", "marker")
    assert not set(split.training) & set(split.held_out)
    assert names(split.training) == [
        *("tiger face", "rabbit", "honeybee", "elephant", "water buffalo", "cow"),
        *("red apple", "pear", "glass of milk", "pinata", "alien"),
    ]
    pairs = {(s.name, h) for s in split.training for h in split.hands} - {
        (s.name, hand) for hand in split.hands for s in split.subjects_of(hand)
    }
    assert pairs == {("tiger face", "crayon"), ("alien", "marker")}
    assert training_split(artwork) == split


def test_all_subjects_keep_what_is_held_out(artwork):
    more = [subject("rotten grapes"), subject("snail shell"), subject("sour lemon")]
    larger = replace(artwork, subjects=(*SUBJECTS, *more))
    common, everything = training_split(larger), training_split(larger, "all")
    assert everything.held_out == common.held_out
    assert everything.held_out_pairs == common.held_out_pairs
    assert set(common.training) < set(everything.training)
    extra = set(everything.training) - set(common.training)
    # What is about the noun of a held-out subject is not learned either.
    assert sorted(names(extra)) == ["green apple"]
    assert "sour lemon" in names(common.training)


def test_unknown_choices_and_missing_hands_are_refused(artwork):
    with pytest.raises(ConfigError, match="'some'"):
        training_split(artwork, "some")
    with pytest.raises(DataError, match="all hands"):
        training_split(replace(artwork, hands=artwork.hands[2:]))

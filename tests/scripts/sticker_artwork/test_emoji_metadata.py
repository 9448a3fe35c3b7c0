"""Subjects from the metadata of emojibase."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.sticker_artwork.emoji_metadata import plain_words, read_subjects

GROUPS = {
    "groups": {"2": "component", "3": "animals-nature", "9": "flags"},
    "subgroups": {"34": "animal-mammal", "97": "flag", "32": "skin-tone"},
}


def emoji(label, code, order, group=3, subgroup=34, tags=()):
    return {
        "label": label,
        "hexcode": code,
        "tags": list(tags),
        "order": order,
        "group": group,
        "subgroup": subgroup,
        "version": 0.6,
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("T-Rex", "t rex"),
        ("piñata", "pinata"),
        ("woman’s hat", "womans hat"),
        ("person: red hair", "person red hair"),
        ("smile_cat", "smile cat"),
        ("1st place medal", "1st place medal"),
        ("ゆき", ""),
    ],
)
def test_plain_words(text, words):
    assert plain_words(text) == words


@given(st.text())
def test_plain_words_are_what_the_tokenizer_splits(text):
    words = plain_words(text)
    assert words == " ".join(words.split())
    assert re.fullmatch(r"[a-z0-9 ]*", words)
    assert plain_words(words) == words


def test_subjects_have_names_synonyms_and_keywords():
    rows = [
        emoji("tiger face", "1F42F", 2, tags=["animal", "big", "tiger", "3d", "wild cat"]),
        emoji("dog", "1F415", 1),
        emoji("flag: Peru", "1F1F5-1F1EA", 3, 9, 97),
        emoji("light skin tone", "1F3FB", 4, 2, 32),
        {"label": "regional indicator A", "hexcode": "1F1E6"},
    ]
    lists = [
        {"1F42F": ["tiger_face", "tiger"], "1F415": "dog2"},
        {"1F42F": "tiger", "1F415": ["a_very_long_name_of_dogs", "hound"]},
    ]
    dog, tiger = read_subjects(rows, GROUPS, lists)
    assert (dog.id, dog.name, dog.synonyms, dog.keywords) == ("1f415", "dog", ("hound",), ())
    assert (tiger.id, tiger.name, tiger.synonyms) == ("1f42f", "tiger face", ("tiger",))
    assert tiger.keywords == ("animal", "big")
    assert (tiger.group, tiger.subgroup, tiger.version) == ("animals-nature", "animal-mammal", 0.6)

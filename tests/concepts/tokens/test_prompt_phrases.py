"""Finding, removing and comparing phrases of prompts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from customize.concepts.tokens.prompt_phrases import (
    check_phrases,
    common_words,
    content_words,
    find_phrase,
    mentioned_spans,
    regional_prompts,
    remove_phrases,
    unmentioned_part,
)
from customize.errors import ConfigError

PAIR = "a photo of <rex> and <tom> on a beach"


@pytest.mark.parametrize(
    ("prompt", "phrases", "expected"),
    [
        (
            PAIR,
            ["<rex>", "<tom>"],
            ["a photo of on a beach", "a photo of <rex> on a beach", "a photo of <tom> on a beach"],
        ),
        (
            "<rex>, <tom> and <bolt> in a room",
            ["<rex>", "<tom>", "<bolt>"],
            ["in a room", "<rex> in a room", "<tom> in a room", "<bolt> in a room"],
        ),
        (
            "a red car & the blue cat, on a road",
            ["red car", "blue cat"],
            ["on a road", "a red car, on a road", "the blue cat, on a road"],
        ),
        (
            "<rex> wearing a hat and <tom> in the snow",
            ["<rex> wearing a hat", "<tom>"],
            ["in the snow", "<rex> wearing a hat in the snow", "<tom> in the snow"],
        ),
        (PAIR, ["<tom>"], ["a photo of <rex> on a beach", PAIR]),
        ("a dog and a dog", ["dog"], ["", "a dog and a dog"]),
    ],
)
def test_regional_prompts(prompt, phrases, expected):
    assert regional_prompts(prompt, phrases) == expected


def test_phrases_match_whole_words_in_any_case():
    assert find_phrase("Red  Car", "a red car") == [(2, 9)]
    assert find_phrase("<REX>", PAIR) == [(11, 16)]
    assert find_phrase("car", "a scarf, a cartoon") == []
    assert find_phrase("rex", PAIR) == []  # inside a trigger
    assert find_phrase("<rex>", "<rex>-style") == []  # another token
    assert find_phrase(" ", PAIR) == []
    assert remove_phrases("nothing of it", ["<rex>"]) == "nothing of it"


def test_missing_phrase_is_refused_with_similar_ones():
    with pytest.raises(ConfigError, match=r"'<rax>' is not in the prompt.*<rex>"):
        check_phrases(PAIR, ["<rax>"], ["<rex>"], "regions")
    with pytest.raises(ConfigError, match=r"similar are red car"):
        check_phrases("a red car on a road", ["rad car"], [], "regions")
    with pytest.raises(ConfigError, match="use words of the prompt"):
        check_phrases("a red car on a road", ["zebra"], [], "regions")


def test_phrases_that_share_words_are_refused():
    with pytest.raises(ConfigError, match="share words"):
        check_phrases("<rex> wearing a hat", ["<rex>", "<rex> wearing a hat"], [], "regions")


def test_common_words_of_captions():
    captions = [
        "<rex>, a dog, on a Beach wearing a red hat",
        "a photo of <rex> in a hat, on the beach",
    ]
    assert common_words(captions, ("<rex>", "dog")) == ["beach", "hat"]
    assert common_words(["a photo of <rex>"] * 2, ("<rex>", "dog")) == []
    assert common_words([], ()) == []


def test_content_words():
    assert content_words("a photo of <rex> on a sun-lit beach, the beach") == [
        "<rex>",
        "sun-lit",
        "beach",
    ]


@pytest.mark.parametrize(
    ("phrase", "prompt", "part"),
    [
        ("on a beach", "a dog at the Beach", ""),
        ("on a beach", "a photo on a table", "on a beach"),
        ("red hat", "a red car", "hat"),
        ("striped red background", "a dog on a blue background", "striped red"),
        ("a hat on a beach", "a dog at the beach", "hat"),
        ("Beach, beach hat", "a hat", "Beach, beach"),
        ("on a", "a dog on a table", ""),  # has no other words
        ("on a", "a dog", "on a"),
        ("sun-lit beach", "a beach", "sun-lit"),
        ("sun-lit beach", "a sun", "sun-lit beach"),
    ],
)
def test_words_of_a_prompt_are_left_out_of_a_phrase(phrase, prompt, part):
    assert unmentioned_part(phrase, prompt) == part
    shared = [phrase[start:end].lower() for start, end in mentioned_spans(phrase, prompt)]
    assert all(word in prompt.lower() for word in shared) and bool(shared) == (part != phrase)


@given(
    st.lists(
        st.sampled_from(["red", "hat", "on", "a", "beach", "<rex>", "near", "sun-lit"]), max_size=6
    )
)
def test_what_is_left_of_a_phrase_shares_no_content_word(words):
    prompt = "a dog with a red hat on a sun"
    part = unmentioned_part(" ".join(words), prompt)
    assert not set(content_words(part)) & set(content_words(prompt))
    assert set(content_words(part)) == set(content_words(" ".join(words))) - {"red", "hat"}

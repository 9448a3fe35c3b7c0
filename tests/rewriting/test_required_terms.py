"""What a rewriting must keep of a prompt, and what is found to be wrong with one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from customize.rewriting.required_terms import (
    added_words,
    find_problems,
    missing_terms,
    required_terms,
)


def problems(prompt, text, **known):
    return find_problems(required_terms(prompt, **known), text)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("puppy at the seaside", "a photo of a dog on a beach"),
        ("a photo of <rex> at the shore", "a photo of <rex> on a beach"),
        ("2 dogs", "two dogs on a lawn"),
        ("three cats", "a group of 3 cats"),
        ('a sign that says "OPEN 24 h"', 'a wooden sign, on it "OPEN 24 h"'),
        ("a bunny that isn't spotted", "a plain rabbit"),
        ("a bunny that isn't spotted", "a rabbit that is not spotted"),
        ("a dog without a hat", "a dog with no hat"),
        ("a dog, no hats or scarves", "a dog on a lawn"),
        ("not a red car", "a blue car"),
        ("a 1920x1080 screen at 5:30", "a screen of 1920x1080 pixels, at 5:30"),
        ("one dog", "a dog"),
        ("1 dog", "one dog"),
        ("20 birds", "twenty birds"),
        ("1000 stars", "1,000 stars"),
        ("two shoes", "a pair of shoes"),
        ("no chairs, no tables", "a room without chairs and tables"),
        ("a dog without a hat in a hat shop", "a bareheaded dog in a hat shop"),
        ('a 12" pizza and a 9" one', "a 12 inch pizza and a 9 inch one"),
        ("25 birds", "twenty-five birds"),
        ("a trio of cats", "three cats"),
        ("two dogs", "two playful dogs, 8k, 35mm, f/1.8, 24 fps, 4k details, iso 50"),
        ("a dog", "a dog, 35 mm lens, 16:9, 3d render, unreal engine 5, 90s style, 50 degrees"),
        ("a dog", "a two-tone dog, three point lighting, five star hotel, in the 1920s"),
        ("a dog and a cat", "a dog and a cat; the two animals play, on their four legs"),
        ("a cat with glasses", "a cat wearing a pair of glasses"),
        ('a sign "5"', 'a sign "5" with 5 dogs'),
        ("a sign", 'a sign that says "two dogs"'),
        ("two dogs", "two dogs with two balls"),
        ("ein roter Hund mit Hut im Schnee", "ein roter Hund mit einem Hut im tiefen Schnee"),
    ],
)
def test_faithful_rewritings_have_no_problems(prompt, text):
    assert problems(prompt, text) == []


@pytest.mark.parametrize(
    ("prompt", "text", "problem"),
    [
        ("a photo of <rex> at the shore", "a photo of a dog on a beach", "it lacks <rex>"),
        ("a dog", "a photo of <tom> and a dog", "it contains <tom>"),
        ("2 dogs", "dogs", "it lacks 2"),
        ("two dogs and two cats", "two dogs and cats", "it lacks 2"),
        ('a sign that says "OPEN"', 'a sign that says "Open"', "it lacks OPEN"),
        ("a bunny that isn't spotted", "a spotted bunny", "it asks for spotted"),
        ("a dog without a hat", "a dog wearing a hat", "it asks for hat"),
        ("a dog without a hat", "a dog with hats", "it asks for hat"),
        ("a dog with no hat or scarf", "a dog wearing a scarf", "it asks for scarf"),
        ("a dog, no red car, please", "a dog beside a red car", "it asks for red car"),
        ("ein roter Hund im Schnee mit Hut", "a red dog with a hat in the snow", "language"),
        ("two dogs", "two dogs and three cats", "it adds three cats"),
        ("a dog", "2 big fluffy dogs, 8k", "it adds 2 big fluffy dogs"),
        ("a dog", "a group of five dogs", "it adds five dogs"),
        ("a girl", "2girls, 8k", "it adds 2 girls"),
        ("a man", "a man and twelve women", "it adds twelve women"),
        ("a dog", "a dog with a dozen red roses", "it adds dozen red roses"),
        ("a flock", "twenty-five birds", "it adds 25 birds"),
        ("1girl, 2boys", "girls and boys", "it lacks 2"),
        ("no women", "a woman on a beach", "it asks for women"),
        ("a tree, no leaves", "a tree with a leaf", "it asks for leaves"),
        ("a street, no cars and trucks", "a street with a truck", "it asks for trucks"),
        ("zero clouds", "a sky with clouds", "it asks for clouds"),
        ("a cat instead of a dog", "a cat and a dog", "it asks for dog"),
        ("kein Hund", "ein Hund", "it asks for hund"),
        ("a sign, „OPEN“", "a sign, „CLOSED“", "it lacks OPEN"),
        ("a sign, ‘OPEN’", "a sign, ‘CLOSED’", "it lacks OPEN"),
        ("собака на пляже", "a dog on a beach", "it is in another language"),
        ("a dog on a beach", "海滩上的一只狗", "it is in another language"),
    ],
)
def test_what_a_rewriting_loses_or_turns_round_is_found(prompt, text, problem):
    (found,) = problems(prompt, text)
    assert problem in found


@pytest.mark.parametrize(
    ("prompt", "text", "lost", "added"),
    [
        ("two dogs", "three dogs", "2", "three dogs"),
        ("twenty birds", "thirty birds", "20", "thirty birds"),
    ],
)
def test_another_count_is_lost_and_added(prompt, text, lost, added):
    assert problems(prompt, text) == [f"it lacks {lost}", f"it adds {added}"]


def test_trigger_words_phrases_and_avoided_words_of_the_call():
    known = {"triggers": ["sks dog", "<tom>"], "keep": ["golden hour", "absent"], "avoid": ["hat"]}
    required = required_terms("a photo of sks dog at golden hour", **known)
    assert required.triggers == ("sks dog",)
    assert required.phrases == ("golden hour",)
    assert missing_terms(required, "a dog at dusk") == ["sks dog", "golden hour"]
    assert find_problems(required, "a photo of sks dog in a hat at golden hour") == [
        "it asks for hat, which the prompt excludes"
    ]


def test_inflected_forms_of_the_prompts_words_are_not_added():
    prompt = "a smiling cat wears a carved mask, sits on the dog's bed, carries a red hat"
    text = "smiles, a cat wearing a mask to carve, sitting on the beds of dogs, carrying red hats"
    assert added_words(prompt, text) == []
    assert added_words("a red cat in the evening", "a singing cat rings a bell, bred") == [
        "singing",
        "rings",
        "bell",
        "bred",
    ]


def test_words_that_were_added_are_reported_without_forms_of_the_users_own():
    assert added_words("dogs on the beach", "a photo of a dog on beaches, with umbrellas") == [
        "umbrellas"
    ]


PARTS = st.sampled_from(["<rex>", "<tom>s", "2", "two", "no", "hat", '"', "'", "-", ",", "a", " "])


@given(st.text(max_size=120) | st.lists(PARTS, max_size=12).map("".join))
def test_every_prompt_is_a_faithful_rewriting_of_itself(prompt):
    assert [p for p in problems(prompt, prompt) if "excludes" not in p] == []

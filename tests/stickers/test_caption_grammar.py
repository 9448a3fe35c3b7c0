"""Captions of stickers: they name what is in the scene, and nothing that is held out."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from customize.stickers.artwork import Subject
from customize.stickers.caption_grammar import (
    CLASS_WORDS,
    PLACES,
    RELATIONS,
    caption,
    caption_sticker,
    class_word,
    place,
    relation,
    training_wording,
    with_article,
)
from customize.stickers.subjects import training_split
from customize.stickers.world import GROUND_COLOURS, TEXTURES, Sticker, compose_scene, random_scene
from customize.storybook.bundled_models import make_tokenizer
from tests.stickers.making import SUBJECTS

SEEDS = st.integers(0, 2**32)
WIDTHS = st.sampled_from((64, 96, 128))


@pytest.fixture(scope="module")
def split(artwork):
    return training_split(artwork)


@pytest.fixture(scope="module")
def wording(split):
    return training_wording(split)


def generator(seed):
    return np.random.default_rng(seed)


def words_of(text):
    return re.findall(r"[a-z]+", text)


def has(text, phrase):
    return re.search(rf"\b{phrase}\b", text) is not None


def sticker(left, top, size, subject=SUBJECTS[1], hand="marker"):
    return Sticker(subject, hand, left, top, size)


# What captions say


@given(SEEDS, WIDTHS)
def test_a_full_caption_names_all_stickers_and_the_ground(split, wording, seed, width):
    scene = random_scene(generator(seed), split, 0.7, width)
    text = caption(scene, wording)
    assert has(text, f"{scene.ground.colour} background")
    assert [t for t in TEXTURES if has(text, t)] == (
        [] if scene.ground.texture == "plain" else [scene.ground.texture]
    )
    positions = []
    for each in scene.stickers:
        phrase = f"{each.hand} {each.subject.name}"
        assert has(text, phrase)
        positions.append((text.index(phrase), each.centre))
    if " below " not in text and " above " not in text:
        assert [c for _, c in sorted(positions)] == sorted(c for _, c in positions)


@given(SEEDS, WIDTHS, SEEDS)
def test_a_varied_caption_omits_but_never_contradicts(split, wording, seed, width, variation):
    scene = random_scene(generator(seed), split, 0.7, width)
    text = caption(scene, wording, generator(variation))
    assert text == caption(scene, wording, generator(variation))
    assert text == " ".join(text.split())
    shown = {s.subject.id: s for s in scene.stickers}
    for each in scene.stickers:
        code = each.subject.id
        known = {*wording.names[code], wording.classes.get(code)}
        assert any(has(text, name) for name in known if name)
    unseen = {s.name for s in split.training if s.id not in shown}
    assert not [name for name in unseen if has(text, name)]
    assert {h for h in ("crayon", "marker") if has(text, h)} <= {s.hand for s in scene.stickers}
    colours = {c for c in GROUND_COLOURS if has(text, f"{c} background")}
    assert colours <= {scene.ground.colour}
    assert {t for t in TEXTURES if has(text, t)} <= {scene.ground.texture}
    sizes = {s.size for s in scene.stickers}
    assert not has(text, "small") or min(sizes) <= 30
    assert not has(text, "large") or max(sizes) >= 44


@given(SEEDS, WIDTHS, st.sampled_from(("common", "all")))
def test_captions_have_no_held_out_word(artwork, seed, width, choice):
    split = training_split(artwork, choice)
    wording = training_wording(split)
    text = caption(random_scene(generator(seed), split, 0.5, width), wording, generator(seed))
    assert not wording.held_out & set(words_of(text))
    assert not [s.name for s in split.held_out if has(text, s.name)]
    assert set(words_of(text)) <= set(wording.words())


def test_held_out_words_are_names_of_held_out_subjects_and_some_synonyms(wording):
    assert {"snail", "slug", "grapes"} <= wording.held_out
    # Keywords of one subject alone say nothing of others: they stay unknown as well.
    assert {"pet", "insect", "space"} <= wording.held_out
    synonyms = {"big", "cat", "bunny", "bee", "buffalo", "apple", "ufo"}
    assert 0 < len(wording.held_out & synonyms) < 4
    assert not wording.held_out & {"red", "apple", "water", "buffalo", "yellow", "left"}


def test_synonyms_are_of_one_subject_and_keywords_of_several(split, wording):
    names = {s.name: wording.names[s.id] for s in split.training}
    assert names["tiger face"][:2] == ("tiger face", "tiger")
    assert names["red apple"] == ("red apple", "apple")  # no green one is common
    both = training_wording(replace(split, training=(*split.training, SUBJECTS[8])))
    assert both.names[SUBJECTS[7].id] == ("red apple",)
    keywords = {s.name: wording.keywords[s.id] for s in split.training}
    assert keywords["elephant"] == ("wild", "zoo")
    assert keywords["rabbit"] == ("garden",)


def test_a_face_is_no_whole_animal_where_there_is_one(split):
    tiger = Subject("1f999", "tiger", (), (), "animals-nature", "animal-mammal", 1.0)
    wording = training_wording(replace(split, training=(*split.training, tiger)))
    assert "tiger" not in wording.names[SUBJECTS[0].id]
    assert wording.names["1f999"] == ("tiger",)


def test_names_replace_hand_and_name(split, wording):
    scene = compose_scene(generator(1), [(SUBJECTS[0], "marker"), (SUBJECTS[9], "crayon")])
    text = caption(scene, wording, names=("<rex>", None))
    assert "<rex>" in text and "crayon pear" in text and "tiger" not in text
    for seed in range(40):
        varied = caption(scene, wording, generator(seed), names=("<rex>", "<tom>"))
        assert "<rex>" in varied and "<tom>" in varied
        assert not {"tiger", "pear", "marker", "crayon"} & set(words_of(varied))


# Words


@pytest.mark.parametrize(
    ("subgroup", "word"),
    [
        ("animal-bird", "bird"),
        ("animal-mammal", "animal"),
        ("food-fruit", "fruit"),
        ("food-prepared", "food"),
        ("musical-instrument", "instrument"),
        ("music", "music"),
        ("keycap", None),
    ],
)
def test_class_words(subgroup, word):
    assert class_word(Subject("1", "x", (), (), "g", subgroup, 1.0)) == word


def test_a_class_word_that_names_a_subject_is_of_it_alone(split):
    bird = Subject("1f998", "bird", (), (), "animals-nature", "animal-bird", 1.0)
    owl = Subject("1f997", "owl", (), (), "animals-nature", "animal-bird", 1.0)
    wording = training_wording(replace(split, training=(bird, owl)))
    assert wording.classes == {}


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        ("apple", "an apple"),
        ("red apple", "a red apple"),
        ("grapes", "grapes"),
        ("cactus", "a cactus"),
        ("glass", "a glass"),
    ],
)
def test_articles(words, phrase):
    assert with_article(words) == phrase


def test_sizes_are_words_below_30_and_above_44_pixels(wording):
    def say(size):
        return caption_sticker(sticker(0, 0, size), wording)

    assert say(24) == say(30) == "a small marker rabbit"
    assert say(31) == say(43) == "a marker rabbit"
    assert say(44) == say(56) == "a large marker rabbit"


def test_places_are_those_of_the_centre():
    assert place(sticker(20, 20, 24), 64) == "in the middle"
    assert place(sticker(0, 20, 24), 64) == "on the left"
    assert place(sticker(40, 0, 24), 64) == "at the top right"
    assert place(sticker(104, 40, 24), 128) == "at the bottom right"
    assert len(set(PLACES.values())) == 9


@given(SEEDS, WIDTHS)
def test_relations_hold_of_the_centres(split, wording, seed, width):
    scene = compose_scene(
        generator(seed), [(SUBJECTS[0], "marker"), (SUBJECTS[9], "crayon")], width=width
    )
    first, second = scene.stickers
    said = {
        "to the left of": first.centre[0] < second.centre[0],
        "to the right of": first.centre[0] > second.centre[0],
        "above": first.centre[1] < second.centre[1],
        "below": first.centre[1] > second.centre[1],
    }
    text = caption(scene, wording, generator(seed), names=("<rex>", "<tom>"))
    for words, holds in said.items():
        if words in text:
            tail = text.index("<rex>") < text.index("<tom>")
            assert holds if tail else not holds
    found = relation(first, second)
    assert found is None or found in RELATIONS or found in RELATIONS.values()
    assert found is None or found == "to the left of" or said[found]


# Tokens


def test_every_word_of_captions_is_one_token(wording):
    tokenizer = make_tokenizer(wording.words(), 48)
    pieces = {word: tokenizer.tokenize(word) for word in wording.words()}
    assert {word: p for word, p in pieces.items() if p != [word + "</w>"]} == {}
    assert set(CLASS_WORDS.values()) | set(GROUND_COLOURS) <= pieces.keys()


@pytest.mark.parametrize("text", ["a grumpy snail", "xylophone", "zq7 & ünï"])
def test_unknown_words_are_spelled(wording, text):
    tokenizer = make_tokenizer(wording.words(), 48)
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")

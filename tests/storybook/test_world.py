"""The test world: colours, captions, prompts and drawings."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from customize.storybook.bundled_models import make_tokenizer
from customize.storybook.caption_grammar import (
    ACCESSORY_PHRASES,
    BACKGROUND_PHRASES,
    OPENINGS,
    WORDS,
    caption,
    parse_prompt,
)
from customize.storybook.example_concepts import BUNDLED, bundled_concept, make_concept
from customize.storybook.scene_drawing import draw_scene
from customize.storybook.world import (
    ACCESSORIES,
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    PATTERNS,
    Identity,
    Scene,
    colour_word,
    compose_scene,
    random_identity,
    random_scene,
    random_wide_scene,
)


@st.composite
def scenes(draw_from: st.DrawFn) -> Scene:
    rng = np.random.default_rng(draw_from(st.integers(0, 2**32)))
    count = draw_from(st.integers(1, 2))
    identities = tuple(
        random_identity(
            rng,
            draw_from(st.sampled_from(CLASSES)),
            draw_from(st.sampled_from([*COLOURS, None])),
            draw_from(st.sampled_from(PATTERNS)),
        )
        for _ in range(count)
    )
    accessories = tuple(draw_from(st.sampled_from(ACCESSORIES)) for _ in range(count))
    return compose_scene(rng, identities, accessories, draw_from(st.sampled_from(BACKGROUNDS)))


def one(kind: str = "dog", **changes: object) -> Scene:
    """A scene of one thing, the same but for what is asked to differ."""
    rng = np.random.default_rng(3)
    identity = random_identity(rng, kind, "red", "striped")
    return compose_scene(rng, (replace(identity, **changes),), ("none",), "room")


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(draw_scene(scene)).astype(int)


# Words


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_every_word_of_the_grammar_is_one_token(tokenizer):
    metadata = " ".join(
        [*OPENINGS, *BACKGROUND_PHRASES.values(), *ACCESSORY_PHRASES.values()]
    ).split()
    words = sorted({*WORDS, *metadata, *CLASSES, *COLOURS, *PATTERNS, "and"})
    pieces = {word: tokenizer.tokenize(word) for word in words}
    assert {word: actual for word, actual in pieces.items() if actual != [word + "</w>"]} == {}


@pytest.mark.parametrize("text", ["xylophone", "a photo of a xylophone on a beach", "zq7 & ünï"])
def test_words_outside_the_grammar_round_trip(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_the_longest_caption_fits(tokenizer):
    rng = np.random.default_rng(0)
    both = tuple(random_identity(rng, kind, "purple", "spotted") for kind in ("robot", "rabbit"))
    text = caption(compose_scene(rng, both, ("glasses", "scarf"), "forest"))
    assert len(tokenizer(text).input_ids) <= tokenizer.model_max_length


# Captions


@given(scenes())
def test_a_full_caption_names_all_attributes(scene):
    request = parse_prompt(caption(scene))
    assert request.background == scene.background
    assert len(request.things) == len(scene.things)
    for asked, thing in zip(request.things, scene.things, strict=True):
        identity = thing.identity
        assert (asked.kind, asked.colour, asked.accessory) == (
            identity.kind,
            identity.colour,
            thing.accessory,
        )
        assert asked.pattern == (None if identity.pattern == "plain" else identity.pattern)


@given(scenes(), st.integers(0, 2**32))
def test_a_varied_caption_omits_but_never_contradicts(scene, seed):
    request = parse_prompt(caption(scene, np.random.default_rng(seed)))
    assert request.background in (None, scene.background)
    for asked, thing in zip(request.things, scene.things, strict=True):
        assert asked.kind == thing.identity.kind
        assert asked.colour in (None, thing.identity.colour)
        assert asked.pattern in (None, thing.identity.pattern)
        assert asked.accessory == thing.accessory  # an accessory is always said


@given(scenes())
def test_names_replace_class_and_looks(scene):
    names = ("<rex>", "<tom>")[: len(scene.things)]
    text = caption(scene, names=names)
    request = parse_prompt(text)
    assert all(name in text for name in names)
    assert request.background == scene.background
    assert [(a.kind, a.colour, a.pattern) for a in request.things] == [(None,) * 3] * len(names)
    assert [a.accessory for a in request.things] == [t.accessory for t in scene.things]


# Colours


@pytest.mark.parametrize(
    ("rgb", "word"),
    [
        ((255, 0, 0), "red"),
        ((255, 30, 5), "red"),
        ((255, 225, 0), "yellow"),
        ((20, 200, 40), "green"),
        ((30, 60, 230), "blue"),
        ((150, 30, 220), "purple"),
        ((250, 250, 245), "white"),
        ((255, 128, 0), None),  # orange lies between the words
        ((0, 200, 200), None),  # so does cyan
        ((128, 128, 128), None),  # grey is no word either
        ((180, 140, 140), None),
    ],
)
def test_colour_word(rgb, word):
    assert colour_word(rgb) == word


@given(st.sampled_from(COLOURS), st.integers(0, 2**32))
def test_a_body_drawn_for_a_colour_word_has_it(colour, seed):
    assert random_identity(np.random.default_rng(seed), colour=colour).colour == colour


# Pictures


@settings(max_examples=20)
@given(scenes())
def test_drawing_is_deterministic(scene):
    picture = draw_scene(scene)
    assert picture.size == (64, 64)
    assert picture.mode == "RGB"
    assert draw_scene(scene).tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"body": (60, 160, 60)},
        {"accent": (0, 90, 200)},
        {"mark": (250, 250, 250)},
        {"mark_seed": 5},
        {"pattern": "plain"},
        {"pattern": "spotted"},
        {"width": -0.9},
        {"height": 0.9},
        {"head": -0.9},
        {"ear": 0.9},
        {"eye_size": -0.9},
        {"eye": (0, 0, 0)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_attribute_of_an_identity_is_visible(changes):
    difference = np.abs(pixels(one(**changes)) - pixels(one()))
    assert difference.max() > 20


def test_classes_accessories_and_backgrounds_are_visible():
    base = one()
    worn = [replace(base, things=(replace(base.things[0], accessory=a),)) for a in ACCESSORIES]
    backgrounds = [replace(base, background=background) for background in BACKGROUNDS]
    kinds = [one(kind) for kind in CLASSES]
    for group in (worn, backgrounds, kinds):
        pictures = [pixels(scene) for scene in group]
        for k, picture in enumerate(pictures):
            assert all(np.abs(picture - other).mean() > 1 for other in pictures[:k])
    assert np.array_equal(pixels(worn[ACCESSORIES.index("none")]), pixels(base))


@pytest.mark.parametrize("kind", CLASSES)
def test_each_class_can_wear_each_accessory(kind):
    base = one(kind)
    for accessory in ACCESSORIES[1:]:
        worn = replace(base, things=(replace(base.things[0], accessory=accessory),))
        assert (np.abs(pixels(worn) - pixels(base)).max(axis=2) > 20).sum() > 15


def test_two_things_are_left_and_right_of_the_centre():
    rng = np.random.default_rng(1)
    scene = compose_scene(rng, (random_identity(rng), random_identity(rng)))
    assert scene.things[0].x < 32 < scene.things[1].x


def test_random_scenes_cover_all_attributes():
    rng = np.random.default_rng(0)
    actual = [random_scene(rng) for _ in range(400)]
    things = [thing for scene in actual for thing in scene.things]
    assert {s.background for s in actual} == set(BACKGROUNDS)
    assert {t.identity.kind for t in things} == set(CLASSES)
    assert {t.identity.colour for t in things} == {*COLOURS, None}
    assert {t.identity.pattern for t in things} == set(PATTERNS)
    assert {t.accessory for t in things} == set(ACCESSORIES)
    assert 0.2 < np.mean([len(s.things) == 2 for s in actual]) < 0.4


# Concepts


def test_concepts_depend_on_their_seed_only():
    assert make_concept("rex", "dog", 6) == make_concept("rex", "dog", 6)
    assert make_concept("rex", "dog", 6).identity != make_concept("rex", "dog", 7).identity


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_concepts_have_two_backgrounds_and_no_accessory(name, tmp_path):
    story = bundled_concept(name)
    assert isinstance(story.identity, Identity)
    assert len(story.scenes) == 5
    assert len(story.backgrounds) == 2
    assert all(scene.things[0].accessory == "none" for scene in story.scenes)
    assert all(text.startswith(f"a photo of <{name}> ") for text in story.captions())
    story.write(tmp_path / name)
    assert sorted(p.name for p in (tmp_path / name).iterdir()) == sorted(
        f"{k}.{end}" for k in range(5) for end in ("png", "txt")
    )
    assert (tmp_path / name / "3.txt").read_text() == story.captions()[3] + "\n"


def test_triggers_may_contain_words_of_the_grammar():
    request = parse_prompt("a photo of <salt-and-pepper> and a red dog on a beach")
    assert len(request.things) == 2 and request.things[1].kind == "dog"


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.sampled_from((96, 128, 160)))
def test_wide_scenes_hold_their_things_whole_and_apart(seed: int, width: int) -> None:
    scene = random_wide_scene(np.random.default_rng(seed), width)
    assert draw_scene(scene).size == (width, 64)
    edges = [(thing.x - thing.size, thing.x + thing.size) for thing in scene.things]
    # Figures reach up to 1.05 times their size to the sides; tails may touch.
    assert all(left >= -2 and right <= width + 2 for left, right in edges)
    centres = [thing.x for thing in scene.things]
    assert all(b - a > 20 for a, b in itertools.pairwise(centres))
    things = parse_prompt(caption(scene)).things
    assert [thing.kind for thing in things] == [thing.identity.kind for thing in scene.things]


def test_a_wide_background_goes_on_to_the_right_border() -> None:
    for background in BACKGROUNDS:
        image = np.asarray(draw_scene(Scene((), background, 3, width=128)))
        assert (image[-1] == image[-1, :1]).all() or background == "space"
        assert image[:, 64:].std() > 5  # the right half is drawn too

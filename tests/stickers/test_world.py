"""Scenes of stickers: deterministic, inside the picture, apart, and without what is held out."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from customize.stickers.subjects import training_split
from customize.stickers.world import (
    GROUND_COLOURS,
    SIZES,
    TEXTURES,
    compose_scene,
    random_ground,
    random_scene,
)
from tests.stickers.making import SUBJECTS

WIDTHS = st.sampled_from((64, 96, 128, 160))
SEEDS = st.integers(0, 2**32)


def generator(seed):
    return np.random.default_rng(seed)


def figures(count):
    return [(subject, "marker") for subject in SUBJECTS[:count]]


def overlap(a, b):
    return (
        abs(a.centre[0] - b.centre[0]) < (a.size + b.size) / 2
        and abs(a.centre[1] - b.centre[1]) < (a.size + b.size) / 2
    )


@given(SEEDS, WIDTHS, st.integers(1, 3))
def test_stickers_lie_inside_and_apart(seed, width, count):
    scene = compose_scene(generator(seed), figures(count), width=width)
    assert [s.subject for s in scene.stickers] == list(SUBJECTS[:count])
    for sticker in scene.stickers:
        assert SIZES[0] <= sticker.size <= SIZES[1]
        assert 0 <= sticker.left <= width - sticker.size
        assert 0 <= sticker.top <= 64 - sticker.size
    assert not any(overlap(a, b) for a, b in itertools.combinations(scene.stickers, 2))


@given(SEEDS, WIDTHS, st.integers(1, 3))
def test_scenes_depend_on_the_generator_only(seed, width, count):
    first, second = (compose_scene(generator(seed), figures(count), width=width) for _ in range(2))
    assert first == second


def test_stickers_may_overlap_where_asked():
    scenes = [compose_scene(generator(k), figures(2), overlap=True) for k in range(200)]
    assert any(overlap(*scene.stickers) for scene in scenes)
    assert max(s.size for scene in scenes for s in scene.stickers) == SIZES[1]


def test_sizes_and_places_cover_the_picture():
    single = [compose_scene(generator(k), figures(1)).stickers[0] for k in range(4000)]
    assert {s.size for s in single} == set(range(SIZES[0], SIZES[1] + 1))
    assert {s.left for s in single} == {s.top for s in single} == set(range(41))
    assert abs(np.mean([s.centre for s in single], axis=0) - 32).max() < 1
    pairs = [compose_scene(generator(k), figures(2)).stickers for k in range(400)]
    assert max(s.size for pair in pairs for s in pair) > 32
    sides = Counter((a.centre[0] < b.centre[0], a.centre[1] < b.centre[1]) for a, b in pairs)
    assert min(sides.values()) > 40


@pytest.mark.parametrize(("width", "least"), [(64, 24), (96, 30), (128, 40)])
def test_three_stickers_fit_in_each_width(width, least):
    scenes = [compose_scene(generator(k), figures(3), width=width) for k in range(300)]
    assert max(s.size for scene in scenes for s in scene.stickers) >= least


@settings(max_examples=300)
@given(SEEDS, WIDTHS, st.sampled_from(("common", "all")))
def test_training_scenes_have_nothing_that_is_held_out(artwork, seed, width, choice):
    split = training_split(artwork, choice)
    scene = random_scene(generator(seed), split, 0.8, width)
    assert scene == random_scene(generator(seed), split, 0.8, width)
    assert scene.width == width
    shown = [sticker.subject for sticker in scene.stickers]
    assert 1 <= len(set(shown)) == len(shown) <= 3
    assert set(shown) <= set(split.training)
    for sticker in scene.stickers:
        assert sticker.hand in split.hands
        assert (sticker.subject.id, sticker.hand) not in split.held_out_pairs


def test_random_scenes_cover_all_that_is_trained(artwork):
    split = training_split(artwork)
    scenes = [random_scene(generator(k), split, 0.4) for k in range(1500)]
    drawn = {(s.subject, s.hand) for scene in scenes for s in scene.stickers}
    assert drawn == {(subject, hand) for hand in split.hands for subject in split.subjects_of(hand)}
    assert {scene.ground.colour for scene in scenes} == set(GROUND_COLOURS)
    assert {scene.ground.texture for scene in scenes} == set(TEXTURES)
    counts = Counter(len(scene.stickers) for scene in scenes)
    assert 0.35 < (counts[2] + counts[3]) / len(scenes) < 0.45
    assert 0.1 < counts[3] / (counts[2] + counts[3]) < 0.3
    several = [scene for scene in scenes if len(scene.stickers) > 1]
    assert 0.7 < np.mean([len({s.hand for s in c.stickers}) == 1 for c in several]) < 0.95
    wide = Counter(len(random_scene(generator(k), split, 0, 128).stickers) for k in range(300))
    assert set(wide) == {1, 2, 3}


@given(SEEDS, st.sampled_from(list(GROUND_COLOURS)), st.sampled_from(TEXTURES))
def test_grounds_have_the_colour_asked_and_a_visible_texture(seed, colour, texture):
    ground = random_ground(generator(seed), colour, texture)
    assert (ground.colour, ground.texture) == (colour, texture)
    difference = np.abs(np.subtract(ground.rgb, ground.shade)).max()
    assert 15 < difference < 60

"""Drawings of scenes: exact places and sizes, grounds, transparency."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from customize.stickers.scene_drawing import draw_ground, draw_scene
from customize.stickers.world import TEXTURES, Scene, compose_scene, random_ground
from tests.stickers.making import HANDS, SUBJECTS


def generator(seed):
    return np.random.default_rng(seed)


def pixels(image):
    return np.asarray(image).astype(int)


@st.composite
def scenes(draw):
    rng = generator(draw(st.integers(0, 2**32)))
    count, hand = draw(st.integers(1, 3)), draw(st.sampled_from(HANDS)).name
    shown = draw(st.permutations(SUBJECTS))[:count]
    width = draw(st.sampled_from((64, 96, 128)))
    return compose_scene(rng, [(subject, hand) for subject in shown], width=width)


@settings(max_examples=40)
@given(scenes())
def test_each_sticker_fills_its_square_and_nothing_else(artwork, scene):
    image = draw_scene(scene, artwork)
    assert (image.mode, image.size) == ("RGB", (scene.width, 64))
    assert draw_scene(scene, artwork).tobytes() == image.tobytes()
    for index, sticker in enumerate(scene.stickers):
        others = scene.stickers[:index] + scene.stickers[index + 1 :]
        without = draw_scene(replace(scene, stickers=others), artwork)
        changed = np.abs(pixels(image) - pixels(without)).max(axis=2) > 0
        rows, columns = (np.flatnonzero(changed.any(axis=axis)) for axis in (1, 0))
        assert sticker.top <= rows[0] and rows[-1] < sticker.top + sticker.size
        assert sticker.left <= columns[0] and columns[-1] < sticker.left + sticker.size
        longest = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
        assert sticker.size - 3 <= longest <= sticker.size
        # Its shorter side is in the middle of the square.
        middle = (rows[0] + rows[-1] + 1) / 2, (columns[0] + columns[-1] + 1) / 2
        assert np.abs(np.subtract(middle, sticker.centre[::-1])).max() <= 2.5


def test_a_sticker_keeps_its_colours(artwork):
    subject = SUBJECTS[0]
    picture = pixels(artwork.picture(subject.id, "crayon"))
    colour = picture[picture.shape[0] // 2, picture.shape[1] // 2, :3]
    scene = compose_scene(generator(3), [(subject, "crayon")])
    x, y = (int(c) for c in scene.stickers[0].centre)
    assert np.abs(pixels(draw_scene(scene, artwork))[y, x] - colour).max() <= 1


def test_grounds_are_of_their_two_colours():
    for seed, texture in enumerate(TEXTURES):
        ground = random_ground(generator(seed), "blue", texture)
        drawn = pixels(draw_ground(ground, 96)).reshape(-1, 3)
        low, high = np.sort([ground.rgb, ground.shade], axis=0)
        assert (drawn >= low).all() and (drawn <= high).all()
        share = (drawn == ground.rgb).all(axis=1).mean()
        if texture == "plain":
            assert share == 1
        else:
            assert 0.2 < share < 0.8
            assert (drawn == ground.shade).all(axis=1).mean() > 0.1


@pytest.mark.parametrize("texture", ["striped", "dotted", "checked"])
def test_textures_differ_and_repeat_by_their_period(texture):
    ground = replace(random_ground(generator(1), "green", texture), period=16.0, angle=0.0)
    drawn = pixels(draw_ground(ground, 128))
    assert (drawn[:, :112] == drawn[:, 16:]).all()
    assert not (drawn[:, :120] == drawn[:, 8:]).all()
    for other in set(TEXTURES) - {texture}:
        assert (drawn != pixels(draw_ground(replace(ground, texture=other), 128))).any()


def test_a_scene_without_stickers_is_its_ground(artwork):
    ground = random_ground(generator(2), "pink", "dotted")
    assert draw_scene(Scene((), ground), artwork).tobytes() == draw_ground(ground).tobytes()

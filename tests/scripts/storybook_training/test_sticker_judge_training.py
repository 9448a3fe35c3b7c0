"""Training and measurement of the judges of stickers: labels, matches, figures, resuming."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from customize.stickers.judges import Box, load_sticker_judges
from customize.stickers.prototypes import compute_prototypes
from customize.stickers.recognition_nets import COLOURS
from customize.stickers.scene_drawing import draw_scene
from customize.stickers.subjects import training_split
from customize.stickers.world import TEXTURES, Sticker, compose_scene
from customize.storybook.bundled_models import make_vae
from scripts.storybook_training.measure_sticker_judges import (
    identity_rates,
    match_boxes,
    summarise,
)
from scripts.storybook_training.sticker_judge_data import (
    judge_figures,
    label_scenes,
    random_scenes,
    round_trip_pixels,
)
from scripts.storybook_training.train_sticker_judges import train_sticker_judges
from tests.stickers.making import SUBJECTS, write_artwork


@pytest.fixture(scope="module")
def artwork(tmp_path_factory):
    return write_artwork(tmp_path_factory.mktemp("artwork") / "stickers")


def labelled(artwork, count=20):
    figures = judge_figures(training_split(artwork, "all"))
    numbers = {(subject.id, hand): k for k, (subject, hand) in enumerate(figures)}
    scenes = random_scenes(np.random.default_rng(3), figures, count)
    return figures, scenes, {w: label_scenes(part, artwork, numbers) for w, part in scenes.items()}


def test_judges_learn_no_held_out_subject_and_no_held_out_hand(artwork):
    split = training_split(artwork, "all")
    figures = judge_figures(split)
    assert len(set(figures)) == len(figures)
    assert not {subject for subject, _ in figures} & set(split.held_out)
    assert {hand for _, hand in figures} == {"crayon", "marker"}


def test_labels_are_those_of_the_scenes(artwork):
    figures, scenes, data = labelled(artwork)
    for width, part in scenes.items():
        for row, scene in enumerate(part):
            each = data[width]
            image = each.images(slice(row, row + 1))[0]
            drawn = torch.from_numpy(np.array(draw_scene(scene, artwork))).permute(2, 0, 1)
            assert torch.allclose(image, drawn / 127.5 - 1)
            colour, texture = each.grounds[row].tolist()
            assert (COLOURS[colour], TEXTURES[texture]) == (
                scene.ground.colour,
                scene.ground.texture,
            )
            count = len(scene.stickers)
            assert (each.squares[row, count:] == 0).all()
            assert (each.figures[row, count:] == -1).all()
            for slot, sticker in enumerate(scene.stickers):
                assert figures[each.figures[row, slot]] == (sticker.subject, sticker.hand)
                assert each.squares[row, slot].tolist() == [*sticker.centre, sticker.size]
                width_and_height = each.shapes[row, slot]
                assert width_and_height.max() == sticker.size
                without = replace(scene, stickers=(*scene.stickers[:slot],))
                alone = replace(scene, stickers=(*scene.stickers[: slot + 1],))
                difference = np.not_equal(
                    *(np.asarray(draw_scene(s, artwork)) for s in (without, alone))
                ).any(2)
                for axis, length in enumerate(width_and_height.tolist()):
                    shown = np.flatnonzero(difference.any(axis))
                    assert length - 3 <= shown[-1] - shown[0] + 1 <= length


def test_each_figure_is_drawn_about_as_often(artwork):
    _, _, data = labelled(artwork, 200)
    counts = Counter(int(k) for each in data.values() for k in each.figures[each.figures >= 0])
    assert max(counts.values()) - min(counts.values()) <= 3


def test_a_share_of_the_scenes_is_encoded_and_decoded(artwork):
    _, _, data = labelled(artwork)
    scenes = data[64]
    before = scenes.pixels.clone()
    torch.manual_seed(0)
    round_trip_pixels(scenes, 0.3, make_vae().eval())
    changed = (scenes.pixels != before).flatten(1).any(1)
    assert changed.tolist() == [k < 3 for k in range(10)]


def test_a_sticker_is_matched_with_the_box_that_shares_most():
    rng = np.random.default_rng(0)
    scene = compose_scene(rng, [(SUBJECTS[0], "marker"), (SUBJECTS[1], "marker")], width=128)
    first, second = scene.stickers
    near = Box(first.left + 2, first.top, first.size)
    nearer = Box(first.left, first.top + 1, first.size)
    sightings = match_boxes(scene, [near, nearer, Box(-40, -40, 30)])
    assert [(each.sticker, each.box) for each in sightings] == [(first, nearer), (second, None)]
    assert [each.box for each in match_boxes(scene, [])] == [None, None]


def test_rates_count_missed_stickers_as_wrong(artwork):
    right = Sticker(SUBJECTS[1], "marker", 0, 0, 40)
    small = replace(right, size=26)
    held_out = replace(right, subject=training_split(artwork).held_out[0], size=50)
    rates = summarise(
        [
            (right, 1.0, 2.0, right.subject.id, "crayon"),
            (right, np.inf, np.inf, "", ""),
            (small, 5.0, 0.0, small.subject.id, "marker"),
            (held_out, 0.0, 4.0, held_out.subject.id, "marker"),
        ],
        artwork,
    )
    assert rates["found"] == 0.75
    assert rates["place_error_px"] == 2 and rates["size_error_px"] == 2
    assert rates["place"] == rates["size"] == 0.5
    assert rates["subject"] == pytest.approx(2 / 3) and rates["hand"] == pytest.approx(1 / 3)
    assert rates["subject_24_31px"] == rates["subject_44_56px"] == 1
    assert rates["subject_32_43px"] == rates["subject_common"] == 0.5
    assert rates["subject_held_out"] == 1


def test_concepts_are_told_from_other_subjects_and_from_other_hands():
    # Two subjects in two hands; the distance is the number of differences, in three images each.
    subject, hand = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    apart = (subject[:, None] != subject).float() + 0.5 * (hand[:, None] != hand)
    distance = apart[..., None].expand(4, 4, 3) + 0.1 * torch.rand(4, 4, 3)
    rates = identity_rates(distance, subject, hand, torch.ones(4, dtype=torch.bool))
    assert rates["auc"] == rates["auc_other_subjects"] == rates["auc_other_hands"] == 1
    assert 0 < rates["threshold"] < 0.5 and rates["equal_error"] <= 1 / 12
    # Those of the second hand alone, which are not told from the first hand.
    confused = distance.clone()
    confused[1, 0] = confused[3, 2] = -1
    rates = identity_rates(confused, subject, hand, hand == 1)
    assert rates["auc_other_hands"] == 0 and rates["auc_other_subjects"] == 1
    assert rates["auc"] == 0.5
    assert identity_rates(confused, subject, hand, hand == 0)["auc"] == 1


def test_judges_are_trained_measured_and_written(artwork, tmp_path):
    figures = train_sticker_judges(tmp_path, artwork, None, pictures=20, steps=2)
    assert {"clean_subject", "rough_place", "new_hand_rough_subject"} <= figures.keys()
    assert {"identity_auc", "identity_new_hand_auc_other_hands"} <= figures.keys()
    assert {"boxes.png", "nearest.png"} <= {path.name for path in tmp_path.iterdir()}
    assert "Crayons by the tests (CC0-1.0)" in (tmp_path / "ATTRIBUTION.md").read_text()
    judges = load_sticker_judges(tmp_path)
    assert judges.threshold == figures["threshold"]
    assert judges.prototypes.subjects == tuple(subject.id for subject in SUBJECTS)
    again = compute_prototypes(judges.stickers, artwork, judges.prototypes.hands)
    assert torch.allclose(again.vectors, judges.prototypes.vectors, atol=0.02)
    # A finished training is read only.
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert train_sticker_judges(tmp_path, artwork, None, pictures=20, steps=2) == figures
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

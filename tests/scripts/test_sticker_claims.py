"""scripts/bench/_claims: what is measured again on stickers."""

import argparse
import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from customize.demo.own_drawing import TRAINING
from customize.image_tensors import images_to_tensor
from customize.stickers.judges import load_sticker_judges
from customize.stickers.prototypes import compute_prototypes
from customize.stickers.scene_drawing import draw_scene
from customize.stickers.subjects import Split
from customize.stickers.world import HEIGHT, Scene, Sticker, random_ground
from customize.storybook.bundled_assets import ASSETS
from tests.stickers.conftest import artwork as artwork
from tests.stickers.making import SUBJECTS

BENCH = Path(__file__).parents[2] / "scripts/bench"
CLAIMS = ("class_kept", "content_avoided", "hand_learned", "pairs_from_words", "claim")
SPLIT = Split(SUBJECTS[:10], SUBJECTS[10:], ("crayon", "marker"), frozenset())


@pytest.fixture(scope="module")
def claims():
    """The modules of the claims."""
    sys.path.insert(0, str(BENCH))
    try:
        yield SimpleNamespace(**{n: importlib.import_module(f"_claims.{n}") for n in CLAIMS})
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture
def bench(claims, artwork, tmp_path):
    """A bench on the tests' shapes, with the bundled judges."""
    base = ASSETS / "stickers"
    args = argparse.Namespace(quick=False, base=base, judges=base / "judges", folder=tmp_path)
    made = claims.claim.Bench(args, artwork, SPLIT)
    judges = load_sticker_judges(args.judges)
    known = compute_prototypes(judges.stickers, artwork, SPLIT.hands)
    made.judges = replace(judges, prototypes=known)
    return made


def drawn(artwork, *stickers):
    ground = random_ground(np.random.default_rng(4), "blue", "plain")
    return images_to_tensor([draw_scene(Scene(stickers, ground), artwork)])


def test_a_thing_has_to_be_in_its_half(claims, bench, artwork):
    tiger = Sticker(SUBJECTS[0], "crayon", 2, 18, 28)
    bee = Sticker(SUBJECTS[3], "marker", HEIGHT - 30, 16, 28)
    images = drawn(artwork, tiger, bee)
    module = claims.pairs_from_words
    shows = {
        name: module.shows_subject(bench, name) for name in ("tiger face", "honeybee", "snail")
    }
    assert module.in_half(bench, images, 0, shows["tiger face"]) == [True]
    assert module.in_half(bench, images, 1, shows["honeybee"]) == [True]
    assert module.in_half(bench, images, 1, shows["tiger face"]) == [False]
    assert module.in_half(bench, images, 0, shows["honeybee"]) == [False]
    assert module.in_half(bench, images, 0, shows["snail"]) == [False]
    assert module.in_half(bench, torch.zeros_like(images), 0, shows["tiger face"]) == [False]


def test_subjects_are_recognised_among_those_of_training_alone(bench):
    assert bench.trained_subjects.subjects == tuple(subject.id for subject in SPLIT.training)
    assert bench.subject_id("snail") == SUBJECTS[2].id
    with pytest.raises(ValueError, match="not enough values"):
        bench.subject_id("pinata")  # held out


def test_trainings_have_folders_of_their_settings(bench):
    config = bench.config("rex", "animal", rank=4, steps=50)
    other = bench.config("rex", "animal", rank=8, steps=50)
    assert (config.rank, config.steps, other.rank) == (4, 50, 8)
    assert config.output.parent != other.output.parent
    assert config.images.parent.parent == config.output.parent


def test_pairs_are_drawn_in_both_orders(claims, bench):
    module = claims.pairs_from_words
    groups = module.groups(bench)
    assert groups["two classes"][:2] == ((0, 1), (1, 0)) and len(groups["one class"]) == 6
    prompts = module.prompts_of(("<c00>", "a vehicle"))
    assert prompts[0] == "a sticker of <c00> to the left of a vehicle on a blue background"
    assert prompts[4].endswith("on an orange background")


def test_what_is_preserved_names_none_of_the_companions(claims):
    words = " ".join(TRAINING["preserve_phrases"])
    assert not [name for name in claims.class_kept.COMPANIONS if name in words]
    prompts = claims.class_kept.beside("<rex>")
    assert prompts[:2] == [
        "a sticker of <rex> to the left of a strawberry on a pink background",
        "a sticker of <rex> to the right of a strawberry on a pink background",
    ]


def test_no_scene_asks_for_the_ground_of_the_pictures(claims):
    module = claims.content_avoided
    asked = {colour for *_, colour in module.SCENES}
    assert not asked & {leaky.colour for leaky in module.CONCEPTS}
    leaky = module.CONCEPTS[0]
    assert module.call_of(leaky, module.AVOID) == {"avoid": "striped red background, banana"}
    assert module.call_of(leaky, module.NEGATIVE) == {"negative_prompt": leaky.shared}
    assert module.call_of(leaky, module.AS_IT_IS) == {}


def test_pictures_of_a_leaky_concept_show_it_above_the_other_sticker(claims, bench, monkeypatch):
    module = claims.content_avoided
    monkeypatch.setattr(module, "SUBJECTS", (SUBJECTS[11].name,))
    leaky = module.Leaky(0, "crayon", "red", "striped", "snail")
    images = images_to_tensor(module.pictures(bench, leaky))
    for boxes, _ in bench.see(images):
        assert len(boxes) == 2
        high, low = sorted(boxes, key=lambda box: box.centre[1])
        assert high.size > low.size and high.top + high.size <= low.top + 4
    assert {colour for colour, _ in bench.judges.read_grounds(images)} == {"red"}


def test_a_hand_is_learned_on_other_subjects_than_it_draws(claims, bench, monkeypatch):
    module = claims.hand_learned
    monkeypatch.setattr(module, "STICKERS", 2)
    monkeypatch.setattr(module, "_SUBJECTS", 4)
    subjects, sets = module.subjects_of(bench)
    used = [subject.id for group in (subjects, *sets) for subject in group]
    assert len(used) == len(set(used)) == 4 + 3 * 2
    assert module.prompts_of(SUBJECTS[4:5], "<h0>") == [
        "a sticker of a <h0> elephant on a red background"
    ]
    assert module.prompts_of(SUBJECTS[4:5], "") == ["a sticker of an elephant on a red background"]


def test_figures(claims):
    module = claims.pairs_from_words
    rates = {way: {"two classes": 0.25, "one class": 0.5} for way in (*module.WAYS, module.ALONE)}
    rates[module.WORDS] = {"two classes": 0.75, "one class": 0.5}
    figures = module.figures(rates)
    assert figures["words_both_right_two_classes"] == 0.75
    assert figures["words_margin_over_best_rival_two_classes"] == 0.5
    assert figures["words_margin_over_best_rival_one_class"] == 0.0

    module = claims.class_kept
    kinds = ("identity", "composition", "subjects", "class drift")
    rates = {
        way: dict(zip(kinds, values, strict=True))
        for way, values in {
            module.BASE: (0.0, 0.5, 0.8, 0.0),
            module.NOTHING: (0.9, 0.1, 0.4, 0.3),
            module.PRESERVED: (0.8, 0.4, 0.6, 0.1),
        }.items()
    }
    assert module.figures(rates) == pytest.approx(
        {
            "class_identity_loss": 0.1,
            "class_none_composition_of_base": 0.2,
            "class_none_subjects_of_base": 0.5,
            "class_none_drift": 0.3,
            "class_default_composition_of_base": 0.8,
            "class_default_subjects_of_base": 0.75,
            "class_default_drift": 0.1,
        }
    )

    module = claims.content_avoided
    ways = (module.AS_IT_IS, module.WEIGHT, module.NEGATIVE, module.AVOID)
    rates = {way: {"leak": k / 8, "identity": 0.5} for k, way in enumerate(ways[::-1])}
    assert module.figures(rates)["leak_best_rival"] == 1 / 8
    assert module.figures(rates)["leak_avoid"] == 0.0

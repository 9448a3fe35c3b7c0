"""scripts/bench/_worlds: what is asked of a base of stickers, and when an image shows it."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from customize.image_tensors import images_to_tensor
from customize.stickers.judges import Box, load_sticker_judges
from customize.stickers.prototypes import compute_prototypes
from customize.stickers.scene_drawing import draw_scene
from customize.stickers.subjects import Split
from customize.stickers.world import HEIGHT, Scene, Sticker, random_ground
from customize.storybook.bundled_assets import ASSETS
from tests.stickers.conftest import artwork as artwork
from tests.stickers.making import SUBJECTS

BENCH = Path(__file__).parents[2] / "scripts/bench"


@pytest.fixture(scope="module")
def worlds():
    """The modules of the worlds."""
    sys.path.insert(0, str(BENCH))
    try:
        names = ("sticker_concepts", "storybook_concepts", "subjects", "bench_world")
        yield SimpleNamespace(**{n: importlib.import_module(f"_worlds.{n}") for n in names})
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def judges(artwork):
    """The bundled judges, with prototypes of the tests' shapes."""
    bundled = load_sticker_judges(ASSETS / "stickers" / "judges")
    return replace(
        bundled, prototypes=compute_prototypes(bundled.stickers, artwork, ("crayon", "marker"))
    )


SPLIT = Split(
    SUBJECTS[:10], SUBJECTS[10:], ("crayon", "marker"), frozenset({(SUBJECTS[0].id, "crayon")})
)


def test_concepts_of_a_world_have_other_scenes_and_classes_in_common(worlds, artwork, tmp_path):
    for world in worlds.bench_world.WORLDS.values():
        assert world.judges.is_dir()
    made = worlds.sticker_concepts.make_concept(artwork, SUBJECTS[0], "crayon", 3)
    assert (made.name, made.trigger, made.class_word) == ("c03", "<c03>", "animal")
    assert len(made.colours) == 2
    made.write(tmp_path)
    texts = [(tmp_path / f"{k}.txt").read_text().strip() for k in range(5)]
    assert all("<c03>" in text and "tiger" not in text for text in texts)
    assert len(list(tmp_path.glob("*.png"))) == 5
    kinds = worlds.storybook_concepts.KINDS
    assert [kinds[a] == kinds[b] for a, b in ((0, 2), (1, 5), (3, 10))] == [True] * 3
    assert worlds.storybook_concepts.concept(4).class_word == "car"


def test_prompts_of_scenes_are_in_the_caption_grammar(worlds):
    prompts = [
        worlds.sticker_concepts.prompt_of("<c00>", scene)
        for scene in worlds.sticker_concepts.SCENES
    ]
    assert prompts[0] == "a sticker of a large <c00> on a blue background"
    assert prompts[1] == "a sticker of <c00> on the left on a yellow background"
    assert prompts[5] == "a sticker of <c00> at the bottom on an orange background"
    assert prompts[6] == "a sticker of a small <c00> at the top on a turquoise background"
    assert prompts[7] == "a sticker of <c00> on a dotted purple background"
    plain = [
        worlds.sticker_concepts.prompt_of("octopus", scene)
        for scene in worlds.sticker_concepts.SCENES
    ]
    assert plain[0] == "a sticker of a large octopus on a blue background"
    assert plain[1] == "a sticker of an octopus on the left on a yellow background"


LARGE, LEFT, BOTTOM = (
    ("large", "", "plain", "blue"),
    ("", "on the left", "plain", "blue"),
    ("", "at the bottom", "striped", "blue"),
)


@pytest.mark.parametrize(
    ("scene", "box", "expected"),
    [
        (LARGE, Box(4, 4, 50), [True, True, True]),
        (LARGE, Box(4, 4, 30), [True, True, False]),
        (("small", *LARGE[1:]), Box(4, 4, 32), [True, True, True]),
        (LEFT, Box(0, 20, 30), [True, True, True]),
        (LEFT, Box(30, 20, 30), [True, True, False]),
        (BOTTOM, Box(10, 30, 30), [True, False, True]),
    ],
)
def test_an_image_shows_what_a_scene_asks_for(worlds, scene, box, expected):
    assert worlds.sticker_concepts.prompt_hits(scene, [box], ("blue", "plain")) == expected


def test_an_image_without_stickers_shows_only_its_ground(worlds):
    hits = worlds.sticker_concepts.prompt_hits(
        ("large", "on the left", "plain", "blue"), [], ("blue", "plain")
    )
    assert hits == [False, True, False, False]


def test_subjects_are_asked_for_at_equal_distances_in_hands_of_training(worlds):
    wanted = worlds.subjects.requests(SPLIT, 5, 2)
    assert {each.subject for each in wanted} == set(SUBJECTS[:10:2])
    assert all((each.subject.id, each.hand) not in SPLIT.held_out_pairs for each in wanted)
    assert len({each.number for each in wanted}) == len(wanted) == 9
    assert wanted[0].prompt == "a sticker of a marker tiger face on a red background"


def test_subjects_are_recognised_in_drawn_images_and_not_in_others(worlds, judges, artwork):
    wanted = worlds.subjects.requests(SPLIT, 10, 1)
    images = images_to_tensor([draw_scene(_scene(each), artwork) for each in wanted])
    rates = worlds.subjects.rates(judges, images, wanted, SPLIT)
    assert rates["sticker"] == 1.0 and min(rates["subject"], rates["hand"]) >= 0.8
    assert rates["ground"] >= 0.9 and rates["subject of all"] <= rates["subject"]
    others = worlds.subjects.rates(judges, images.roll(1, 0), wanted, SPLIT)
    assert others["subject"] <= 0.2 and others["ground"] <= 0.2
    nothing = worlds.subjects.rates(judges, torch.zeros_like(images), wanted, SPLIT)
    assert nothing["sticker"] == nothing["subject"] == 0.0


def _scene(request):
    ground = random_ground(np.random.default_rng(request.number), request.colour, "plain")
    side = (HEIGHT - 44) // 2
    return Scene((Sticker(request.subject, request.hand, side, side, 44),), ground)


def test_figures_of_both_parts(worlds, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    bench = importlib.import_module("worlds")
    scores = {"prompt": 0.5, "of its class": 0.25}
    figures = bench.figures_of(
        [
            {"part": "subjects", "name": "all hands", "subject": 0.7, "hand": 0.6, "ground": 1.0},
            {"part": "subjects", "name": "crayon", "subject": 0.2, "hand": 0.1, "ground": 0.0},
            {"part": "drawing", "name": "star-creature", "identity": 1.0} | scores,
            {"part": "drawing", "name": "ghost", "identity": 0.5} | scores,
        ]
    )
    assert figures == {
        "own_drawing_identity": 0.75,
        "own_drawing_prompt": 0.5,
        "own_drawing_identity_of_its_class": 0.25,
        "stickers_base_subject_accuracy": 0.7,
        "stickers_base_hand_accuracy": 0.6,
        "stickers_base_ground_accuracy": 1.0,
    }

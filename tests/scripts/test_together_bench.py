"""scripts/bench/together.py: other methods with one LoRA are plain drawing, and what is scored."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from customize.storybook.bundled_assets import assets_folder
from customize.storybook.judges import judge_inputs, load_judges
from customize.storybook.scene_drawing import draw_scene
from customize.storybook.world import compose_scene
from tests.pipeline.making import concept
from tests.tiny import tiny_sd

BENCH = Path(__file__).parents[2] / "scripts/bench"
PROMPTS = ["a photo of <rex> and <tom> on the beach", "a photo of <rex> and <tom> in a forest"]
SCENE = (("<rex>", "<tom>"), PROMPTS, (1, 2), (32, 32))
ALONE = (("<rex>",), [prompt.replace(" and <tom>", "") for prompt in PROMPTS], (1, 2), (32, 32))


@pytest.fixture(scope="module")
def bench():
    """The modules of the benchmark."""
    sys.path.insert(0, str(BENCH))
    try:
        names = ("cast", "drawing", "gates", "rows", "scores", "trust", "tuning")
        rivals = ("freefuse", "lorashop", "lora_composite", "lora_switch", "attention_regions")
        modules = {name: importlib.import_module(f"_together.{name}") for name in names}
        modules |= {name: importlib.import_module(f"_together.rivals.{name}") for name in rivals}
        modules["together"] = importlib.import_module("together")
        yield SimpleNamespace(**modules)
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture
def few_steps(bench, monkeypatch):
    monkeypatch.setattr(bench.drawing, "STEPS", 4)


def pipeline(*names):
    pipe = tiny_sd()
    classes = {"rex": "dog", "tom": "cat"}
    return pipe.load_custom(
        *(concept(pipe, name, index=k, class_word=classes[name]) for k, name in enumerate(names)),
        merge="sum",
    )


def same(images, expected):
    return torch.allclose(images, expected, rtol=0, atol=1e-4)


def block_of(pipe):
    return next(
        name
        for name, module in pipe.unet.named_modules()
        if type(module).__name__ == "BasicTransformerBlock"
    )


@pytest.mark.usefixtures("few_steps")
def test_one_lora_is_drawn_as_by_a_plain_prompt(bench):
    pipe = pipeline("rex")
    plain = bench.drawing.draw(pipe, *ALONE)
    assert same(bench.lora_composite.draw(pipe, *ALONE, strength=1.0), plain)
    assert same(bench.lora_switch.draw(pipe, *ALONE, strength=1.0), plain)
    settings = bench.freefuse.Settings(block=block_of(pipe), step=2, bias=0.0)
    assert same(bench.freefuse.draw(pipe, *ALONE, settings=settings), plain)
    pipe.unload_custom()
    assert not same(bench.drawing.draw(pipe, *ALONE), plain)


@pytest.mark.usefixtures("few_steps")
def test_residuals_of_one_lora_with_a_full_mask_are_the_plain_image(bench):
    pipe = pipeline("rex")
    plain = bench.drawing.draw(pipe, *ALONE)
    gates = bench.gates.LoraGates(pipe)
    gates.open_only()
    full = {0: torch.ones(4, 1, 1)}
    with gates.attach(), bench.lorashop.blended(pipe.unet, gates, lambda positions: full):
        assert same(bench.drawing.draw(pipe, *ALONE), plain)
    with gates.attach(), bench.lorashop.blended(pipe.unet, gates, lambda positions: None):
        without = bench.drawing.draw(pipe, *ALONE)
    assert not same(without, plain)


@pytest.mark.usefixtures("few_steps")
def test_two_loras_are_drawn_by_each_method_and_leave_no_hook(bench):
    pipe = pipeline("rex", "tom")
    plain = bench.drawing.draw(pipe, *SCENE)
    found = {"block": block_of(pipe)}
    drawn = {
        "composite": bench.lora_composite.draw(pipe, *SCENE),
        "switch": bench.lora_switch.draw(pipe, *SCENE, turn=1),
        "freefuse": bench.freefuse.draw(
            pipe, *SCENE, settings=bench.freefuse.Settings(**found, step=2)
        ),
        "lorashop": bench.lorashop.draw(
            pipe, *SCENE, settings=bench.lorashop.Settings(**found, threshold=0.0)
        ),
        "regions": bench.attention_regions.draw(pipe, *SCENE),
    }
    for name, images in drawn.items():
        assert images.shape == plain.shape, name
        assert not same(images, plain), name
    assert torch.equal(bench.drawing.draw(pipe, *SCENE), plain)


@pytest.mark.usefixtures("few_steps")
def test_composite_averages_what_each_lora_predicts(bench):
    pipe = pipeline("rex", "tom")
    gates = bench.gates.LoraGates(pipe)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 77, 32)
    outputs = []
    with torch.no_grad(), gates.attach():
        for index in (0, 1):
            gates.open_only(index)
            outputs.append(pipe.unet(*inputs, return_dict=False)[0])
        with bench.lora_composite._averaged(pipe.unet, gates):
            averaged = pipe.unet(*inputs, return_dict=False)[0]
    assert not same(outputs[0], outputs[1])
    assert same(averaged, (outputs[0] + outputs[1]) / 2)


def test_switch_takes_turns_and_begins_with_the_first_thing(bench, monkeypatch):
    pipe = pipeline("rex", "tom")
    monkeypatch.setattr(bench.drawing, "STEPS", 5)
    opened = []
    original = bench.gates.LoraGates.open_only
    monkeypatch.setattr(
        bench.gates.LoraGates,
        "open_only",
        lambda self, *indices, **how: opened.append(indices) or original(self, *indices, **how),
    )
    bench.lora_switch.draw(pipe, ("<tom>", "<rex>"), *SCENE[1:], turn=2)
    assert opened == [(1,), (1,), (0,), (0,), (1,)]


def test_balanced_masks_share_the_image(bench):
    maps = torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(0))
    masks = bench.freefuse.balanced_argmax(maps)
    assert torch.equal(masks.sum(0), torch.ones(8, 12))
    areas = masks.mean((1, 2))
    assert float(areas.max() - areas.min()) < 0.1
    halves = torch.zeros(2, 8, 8)
    halves[0, :, :4] = halves[1, :, 4:] = 1.0
    assert torch.equal(bench.freefuse.balanced_argmax(halves), halves)


def test_anchors_are_where_one_thing_is_attended_to_and_not_the_other(bench):
    context = torch.eye(2).repeat_interleave(8, 0)  # positions of two kinds
    attended = torch.full((2, 16), 0.1)
    attended[:, 3] = 0.9  # a sink of both
    attended[0, 1], attended[1, 9] = 0.5, 0.5
    settings = bench.freefuse.Settings(anchors=0.07)
    maps = bench.freefuse.similarity_maps(attended, context, settings)
    assert bool((maps[0, :8] > maps[0, 8:]).all())
    assert bool((maps[1, 8:] > maps[1, :8]).all())


# --- scores -----------------------------------------------------------------------------------


def rendered(cast, names):
    identities = tuple(cast.story(name).identity for name in names)
    rng = np.random.default_rng(3)
    return judge_inputs(
        [draw_scene(compose_scene(rng, identities, ("none", "none"), "city")) for _ in range(4)]
    )


@pytest.fixture(scope="module")
def scorer(bench):
    return bench.scores.Scorer(load_judges(assets_folder() / "judges"))


def test_drawn_pairs_are_right_and_swapped_ones_are_not(bench, scorer):
    pair = ("rex", "bolt")
    group = bench.cast.Group((pair,), (64, 64), ("in a city",) * 4, (1,))
    (scene,) = bench.cast.scenes(group, pair, 1)
    assert scene.prompts[0] == "a photo of <rex> and <bolt> in a city"
    rates = {
        order: bench.scores.rates(scorer.hits(scene, [rendered(bench.cast, order)] * 2))
        for order in (pair, pair[::-1])
    }
    assert rates[pair]["all"] == 1.0
    assert rates[pair]["swapped"] == rates[pair]["missing"] == 0.0
    assert rates[pair]["place"] == 1.0
    assert rates[pair[::-1]]["all"] == 0.0
    assert rates[pair[::-1]]["swapped"] == 1.0
    twice = bench.scores.rates(scorer.hits(scene, [rendered(bench.cast, ("rex", "rex"))] * 2))
    assert (twice["part 0"], twice["part 1"], twice["missing"]) == (1.0, 0.0, 1.0)


def test_a_plain_thing_that_is_a_concept_is_a_leak(bench, scorer):
    pair = ("rex", "tom")
    group = bench.cast.Group((pair,), (64, 64), ("in a city",) * 8, (1,), has_plain=True)
    first, second = bench.cast.scenes(group, pair, 1)
    assert first.things == ("<rex>", "a cat")
    assert second.things == ("a dog", "<tom>")
    for scene in (first, second):
        rates = bench.scores.rates(scorer.hits(scene, [rendered(bench.cast, pair)] * 2))
        assert rates["all"] == rates["leak"] == rates["recognised"] == 1.0
        assert rates["coloured"] == 0.0


def test_crops_of_wide_images_cover_each_part(bench):
    columns = torch.arange(128.0).expand(1, 3, 64, 128)
    for part, (first, last) in enumerate(((0, 64), (64, 128))):
        centres = bench.scores.crops_of(columns, part, 2).mean((1, 2, 3, 4))
        assert first <= float(centres.min()) <= float(centres.max()) <= last
    assert len(bench.scores.crops_of(columns[..., :64], 0, 2)) == 1


def test_judges_are_measured_in_all_sizes(bench, scorer):
    vae = AutoencoderKL.from_pretrained(assets_folder() / "storybook/vae")
    shares = bench.trust.trust(SimpleNamespace(vae=vae), scorer, 4, ("rex", "bolt"))
    for size in ("2_in_64", "2_in_128", "3_in_128"):
        assert shares[f"judge_known_{size}"] > 0.7
        assert shares[f"judge_taken_{size}"] < 0.2


# --- the benchmark ----------------------------------------------------------------------------


def test_settings_are_chosen_on_other_concepts_seeds_and_places(bench):
    tuned, measured = bench.cast.TUNING_GROUPS.values(), bench.cast.GROUPS.values()

    def union(groups, attribute):
        return {value for group in groups for value in getattr(group, attribute)}

    concepts = [
        {n for names in union(groups, "names") for n in names} for groups in (tuned, measured)
    ]
    assert not concepts[0] & concepts[1]
    for attribute in ("seeds", "places"):
        assert not union(tuned, attribute) & union(measured, attribute)
    for group in measured:
        assert len(group.names) * len(group.places) * len(group.seeds) >= 120


def test_figures_of_shares(bench):
    rows = bench.rows
    shares = {
        ("mixed", rows.WORDS): {"all": 0.75},
        ("same", rows.WORDS): {"all": 0.5},
        ("mixed", "plain, sum"): {"all": 0.0},
        ("same", "FreeFuse"): {"all": 0.25},
        ("same", "regions= in boxes, fusion"): {"all": 1.0},  # no rival: it is given boxes
        ("mixed", rows.WORDS_LORA): {"all": 0.5},
        ("same", rows.WORDS_LORA): {"all": 0.25},
        ("mixed", "FreeFuse, ordinary LoRAs"): {"all": 0.25},
        ("same", "FreeFuse, ordinary LoRAs"): {"all": 0.0},
        ("beside a class", rows.WORDS): {"all": 1.0, "leak": 0.5},
        ("beside a class", rows.BASE): {"all": 0.0, "leak": 0.25},
    }
    figures = bench.together.figures_of(
        [
            {"group": group, "drawn": title, "pictures": 4} | row
            for (group, title), row in shares.items()
        ]
    )
    assert figures["words_both_right_mixed"] == 0.75
    # The best rival of all, and of those with ordinary LoRAs.
    assert figures["margin_over_best_rival"] == (0.5 + 0.25) / 2
    assert figures["lora_margin_over_best_rival"] == 0.25
    assert figures["plain_class_leak"] == 0.25
    assert figures["words_both_right_mixed_error"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert "triple_all_right" not in figures

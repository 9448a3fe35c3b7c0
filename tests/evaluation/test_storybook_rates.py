"""Rates of the storybook, with judges that know the scenes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from customize.evaluation.storybook_rates import (
    SCENES,
    accessory_hits,
    attribute_accuracy,
    attribute_hits,
    draw_groups,
    draw_prompts,
    drift,
    evaluation_prompts,
    leak_hits,
    rate_concept,
    rate_pair,
)
from customize.storybook.caption_grammar import (
    ACCESSORY_PHRASES,
    BACKGROUND_PHRASES,
    caption,
    parse_prompt,
)
from customize.storybook.example_concepts import BUNDLED, bundled_concept
from customize.storybook.judges import HEADS, judge_inputs
from customize.storybook.scene_drawing import draw_scene
from customize.storybook.world import (
    ACCESSORIES,
    BACKGROUNDS,
    Identity,
    Scene,
    compose_scene,
    random_scene,
)
from tests.tiny import tiny_sd


def labels(scene: Scene) -> dict[str, str]:
    """What a perfect judge sees in a scene; an absent second thing is seen as the first again."""
    things = (*scene.things, scene.things[0])[:2]
    seen = {"count": "one" if len(scene.things) == 1 else "two", "place": scene.background}
    for slot, thing in enumerate(things):
        seen |= {
            f"kind{slot}": thing.identity.kind,
            f"colour{slot}": thing.identity.colour or "other",
            f"pattern{slot}": thing.identity.pattern,
            f"accessory{slot}": thing.accessory,
        }
    assert seen.keys() == HEADS.keys()
    return seen


@dataclass
class Truth:
    """Stands where trained judges do: it knows which scenes were drawn, and of whom.

    A signature is a one-hot number of an identity; a stranger is at distance 1.
    """

    scenes: list[Scene]
    known: list[Identity]
    threshold: float = 0.5

    def predict_attributes(self, images: Tensor) -> list[dict[str, str]]:
        assert len(images) == len(self.scenes)
        return [labels(scene) for scene in self.scenes]

    def signature_of(self, identity: Identity) -> Tensor:
        return torch.eye(len(self.known))[self.known.index(identity)]

    def distance(self, images: Tensor, signature: Tensor, where: str = "single") -> Tensor:
        expected = self.known[int(signature.argmax())]
        slot = 1 if where == "right" else 0
        return torch.tensor(
            [0.1 if scene.things[slot].identity == expected else 1.0 for scene in self.scenes]
        )


def drawn(scenes: list[Scene]) -> Tensor:
    return judge_inputs([draw_scene(scene) for scene in scenes])


def in_scenes(name: str, scenes: tuple[tuple[str, str], ...] = SCENES) -> list[Scene]:
    """One of the demo's concepts, drawn as each evaluation prompt asks."""
    rng = np.random.default_rng(1)
    return [
        compose_scene(rng, (bundled_concept(name).identity,), (worn,), background)
        for background, worn in scenes
    ]


def test_evaluation_prompts_request_their_scenes() -> None:
    for prompt, (background, accessory) in zip(evaluation_prompts("<rex>"), SCENES, strict=True):
        request = parse_prompt(prompt)
        assert request.background == background and len(request.things) == 1
        assert request.things[0].accessory == accessory
        assert request.things[0].kind is None
    assert {background for background, _ in SCENES} == set(BACKGROUNDS)
    assert {worn for _, worn in SCENES} == set(ACCESSORIES) - {"none"}
    assert evaluation_prompts("a red dog")[0] == "a photo of a red dog wearing a hat on a beach"


@pytest.mark.parametrize("seed", range(20))
def test_a_scene_shows_all_attributes_of_its_caption(seed: int) -> None:
    scene = random_scene(np.random.default_rng(seed), two=0.5)
    request = parse_prompt(caption(scene))
    kinds = [thing.identity.kind for thing in scene.things]
    hits = attribute_hits(labels(scene), request, kinds)
    assert all(hits)
    assert request.background == scene.background
    # Count and background, then for each thing its class and accessory, and its named looks.
    metadata = sum(
        (thing.identity.colour is not None) + (thing.identity.pattern != "plain")
        for thing in scene.things
    )
    assert len(hits) == 2 + 2 * len(scene.things) + metadata


def test_each_missing_attribute_counts_once() -> None:
    rng = np.random.default_rng(3)
    scene = next(
        scene
        for scene in (random_scene(rng, two=1.0) for _ in range(1000))
        if all(t.identity.colour and t.identity.pattern != "plain" for t in scene.things)
    )
    request, seen = parse_prompt(caption(scene)), labels(scene)
    kinds = [thing.identity.kind for thing in scene.things]
    assert len(attribute_hits(seen, request, kinds)) == len(HEADS)
    for head, words in HEADS.items():
        other = next(word for word in words if word != seen[head])
        hits = attribute_hits(seen | {head: other}, request, kinds)
        assert hits.count(False) == 1, head


def test_triggers_have_the_concepts_class() -> None:
    seen = labels(in_scenes("rex")[0])
    request = parse_prompt("a photo of <rex> wearing a hat on a beach")
    assert attribute_hits(seen, request, ["dog"]) == [True] * 4
    assert attribute_hits(seen, request, ["cat"]).count(False) == 1
    assert len(attribute_hits(seen, request, [None])) == 3
    nowhere = parse_prompt("a photo of <rex>")
    assert attribute_hits(seen, nowhere, ["dog"]) == [True, True, False]  # a hat unasked


def test_leak_hits() -> None:
    seen = labels(in_scenes("rex")[0])  # in a hat on a beach
    shown = {"snow", "beach", "hat"}
    # A requested background cannot leak, nor can any where none is requested.
    assert leak_hits(seen, parse_prompt("<rex> on a beach"), shown) == [True, False]
    assert leak_hits(seen, parse_prompt("<rex> in a forest wearing a hat"), shown) == [True, False]
    assert leak_hits(seen, parse_prompt("<rex> wearing a hat"), shown) == []
    assert leak_hits(seen, parse_prompt("<rex>"), shown) == [True]
    assert leak_hits(seen, parse_prompt("<rex> in space"), set()) == []


def test_accessory_hits() -> None:
    rex, tom = (bundled_concept(name).identity for name in ("rex", "tom"))
    rng = np.random.default_rng(0)
    seen = labels(compose_scene(rng, (rex, tom), ("hat", "none"), "beach"))
    both = "a photo of <rex> wearing a hat and <tom> wearing glasses"
    assert accessory_hits(seen, parse_prompt(both)) == [True, False]
    # Where no accessory is asked for, nothing is composed, whatever is worn.
    assert accessory_hits(seen, parse_prompt("a photo of <rex> and <tom> wearing glasses")) == [
        False
    ]
    assert accessory_hits(seen, parse_prompt("a photo of <rex> on a beach")) == []


def test_rates_of_perfect_images() -> None:
    story = bundled_concept("rex")
    scenes = in_scenes("rex")
    truth = Truth(scenes, [story.identity])
    signature = truth.signature_of(story.identity)
    rates = rate_concept(
        truth,  # type: ignore[arg-type]
        drawn(scenes),
        evaluation_prompts(story.trigger),
        signature,
        story.identity.kind,
        story.backgrounds,
    )
    assert (rates.identity, rates.prompt, rates.leak) == (1.0, 1.0, 0.0)
    assert rates.distance == pytest.approx(0.1)


def test_rates_of_images_that_copy_the_references() -> None:
    """What an overfitted concept draws: always itself, always where it was seen."""
    story = bundled_concept("rex")
    seen_in = sorted(story.backgrounds)[0]
    scenes = in_scenes("rex", ((seen_in, "none"),) * len(SCENES))
    truth = Truth(scenes, [story.identity])
    rates = rate_concept(
        truth,  # type: ignore[arg-type]
        drawn(scenes),
        evaluation_prompts(story.trigger),
        truth.signature_of(story.identity),
        story.identity.kind,
        story.backgrounds,
    )
    assert rates.identity == 1.0 and rates.composition == 0.0
    # Right by count and class; by background and accessory where the prompt happens to ask for it.
    matching = sum(background == seen_in for background, _ in SCENES)
    bare = sum(worn == "none" for _, worn in SCENES)
    assert rates.prompt == pytest.approx((2 * len(SCENES) + matching + bare) / (4 * len(SCENES)))
    assert rates.leak == pytest.approx((len(SCENES) - matching) / len(SCENES))


def test_rates_of_images_of_another_identity() -> None:
    rex, tom = bundled_concept("rex"), bundled_concept("tom")
    scenes = in_scenes("tom")
    truth = Truth(scenes, [rex.identity, tom.identity])
    rates = rate_concept(
        truth,  # type: ignore[arg-type]
        drawn(scenes),
        evaluation_prompts("<rex>"),
        truth.signature_of(rex.identity),
        "dog",
        rex.backgrounds,
    )
    assert rates.identity == 0.0 and rates.distance == pytest.approx(1.0)
    assert rates.prompt == pytest.approx(0.75)  # a cat, but the rest as asked
    assert rates.composition == 1.0


def test_composition_counts_prompts_with_an_accessory() -> None:
    story = bundled_concept("rex")
    asked = (("beach", "hat"), ("snow", "scarf"), ("city", "none"), ("room", "none"))
    shown = (("beach", "hat"), ("snow", "none"), ("city", "none"), ("room", "hat"))
    scenes = in_scenes("rex", shown)
    truth = Truth(scenes, [story.identity])
    rates = rate_concept(
        truth,  # type: ignore[arg-type]
        drawn(scenes),
        evaluation_prompts(story.trigger, asked),
        truth.signature_of(story.identity),
        story.identity.kind,
        story.backgrounds,
    )
    assert rates.composition == 0.5
    assert rates.prompt == pytest.approx(14 / 16)


def test_rates_of_pairs() -> None:
    rex, tom = (bundled_concept(name).identity for name in ("rex", "tom"))
    rng = np.random.default_rng(0)
    scenes = [
        compose_scene(rng, pair, ("none", "none"), "beach")
        for pair in ((rex, tom), (tom, rex), (rex, rex), (tom, tom))
    ]
    truth = Truth(scenes, [rex, tom])
    signatures = (truth.signature_of(rex), truth.signature_of(tom))
    rates = rate_pair(truth, drawn(scenes), signatures)  # type: ignore[arg-type]
    assert rates == {"left": 0.5, "right": 0.5, "both": 0.25}


def test_attribute_accuracy_by_kind() -> None:
    rng = np.random.default_rng(7)
    scenes = [random_scene(rng) for _ in range(6)]
    prompts = [caption(scene) for scene in scenes]
    truth = Truth(scenes, [])
    assert set(attribute_accuracy(truth, drawn(scenes), prompts).values()) == {1.0}  # type: ignore[arg-type]
    elsewhere = [
        replace(
            scene,
            background=BACKGROUNDS[(BACKGROUNDS.index(scene.background) + 1) % len(BACKGROUNDS)],
        )
        for scene in scenes
    ]
    actual = attribute_accuracy(Truth(elsewhere, []), drawn(elsewhere), prompts)  # type: ignore[arg-type]
    assert actual["place"] == 0.0 and actual["class"] == actual["accessory"] == 1.0
    assert 0 < actual["all"] < 1


def test_drift_is_relative_to_the_full_range() -> None:
    black, white = -torch.ones(2, 3, 64, 64), torch.ones(2, 3, 64, 64)
    assert drift(black, black) == 0.0
    assert drift(black, white) == 1.0
    assert drift(black, torch.cat([black[:1], white[:1]])) == 0.5


def test_images_depend_on_prompt_and_seed_only() -> None:
    pipe = tiny_sd()
    prompts = ["a dog", "a cat", "a cup"]
    together = draw_prompts(pipe, prompts, seed=3, steps=2)
    assert together.shape == (3, 3, 32, 32)
    assert together.min() >= -1 and together.max() <= 1 and together.min() < 0
    assert not torch.equal(draw_prompts(pipe, prompts, seed=4, steps=2), together)
    counted: list[int] = []
    groups = draw_groups(
        pipe, {"a": ["a hat"], "b": prompts, "c": []}, 3, counted.append, steps=2, batch=2
    )
    torch.testing.assert_close(groups["b"], together)
    assert len(groups["a"]) == 1 and len(groups["c"]) == 0 and counted == [2, 2]


def test_bundled_concepts_satisfy_the_rates_assumptions() -> None:
    for name, (kind, _) in BUNDLED.items():
        story = bundled_concept(name)
        assert story.identity.kind == kind and len(story.backgrounds) == 2
        assert not set(evaluation_prompts(story.trigger)) & set(story.captions())
        assert story.backgrounds <= set(BACKGROUND_PHRASES) and not story.backgrounds & set(
            ACCESSORY_PHRASES
        )
        for text, scene in zip(story.captions(), story.scenes, strict=True):
            assert story.trigger in text and parse_prompt(text).background == scene.background

"""The judges: where they look, what they are measured by, and their files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from customize.errors import ConceptError
from customize.storybook.judges import (
    CROPS,
    HEADS,
    AttributeJudge,
    IdentityJudge,
    Judges,
    crop_thing,
    judge_inputs,
    load_judges,
)
from customize.storybook.scene_drawing import draw_scene
from customize.storybook.train_judges import (
    _fit,
    auc,
    equal_error_threshold,
    identity_views,
    labels,
    measure,
    roughen,
    save_judges,
    train_attributes,
    train_identity,
    train_judges,
)
from customize.storybook.world import compose_scene, random_identity, random_scene


@pytest.fixture
def judges() -> Judges:
    torch.manual_seed(0)
    return Judges(AttributeJudge().eval(), IdentityJudge().eval(), 0.25)


def scenes_of(count: int, things: int) -> list:
    rng = np.random.default_rng(things)
    return [
        compose_scene(rng, tuple(random_identity(rng) for _ in range(things))) for _ in range(count)
    ]


# Where they look


@pytest.mark.parametrize(
    ("where", "things", "slot"), [("single", 1, 0), ("left", 2, 0), ("right", 2, 1)]
)
def test_a_crop_holds_its_thing(where, things, slot):
    left, top, side = CROPS[where]
    assert left >= 0
    assert top >= 0
    assert max(left, top) + side <= 64
    inside = []
    for scene in scenes_of(40, things):
        others = tuple(t for k, t in enumerate(scene.things) if k != slot)
        without = np.asarray(draw_scene(replace(scene, things=others))).astype(int)
        thing = np.abs(np.asarray(draw_scene(scene)) - without).max(axis=2) > 8
        inside.append(thing[top : top + side, left : left + side].sum() / thing.sum())
    assert np.mean(inside) > 0.95
    assert min(inside) > 0.8


def test_left_and_right_crops_show_different_things():
    for scene in scenes_of(10, 2):
        alone = [replace(scene, things=(thing,)) for thing in scene.things]
        both, left, right = judge_inputs([draw_scene(s) for s in (scene, *alone)]).split(1)
        for where, own, other in (("left", left, right), ("right", right, left)):
            near, far = (
                (crop_thing(both, where) - crop_thing(x, where)).abs().mean().item()
                for x in (own, other)
            )
            assert near < 0.05
            assert far > max(0.06, 2 * near)


def test_pictures_become_tensors_in_range():
    picture = draw_scene(scenes_of(1, 1)[0])
    tensor = judge_inputs([picture, picture.resize((128, 128))])
    assert tensor.shape == (2, 3, 64, 64)
    assert tensor.min() >= -1
    assert tensor.max() <= 1
    assert torch.equal(
        (tensor[0] + 1).mul(127.5).round().byte().permute(1, 2, 0), torch.tensor(np.array(picture))
    )


# What they say


def test_a_judge_names_one_label_a_head(judges):
    seen = judges.predict_attributes(judge_inputs([draw_scene(s) for s in scenes_of(3, 2)]))
    assert len(seen) == 3
    for row in seen:
        assert row.keys() == HEADS.keys()
        assert all(label in HEADS[name] for name, label in row.items())


def test_a_signature_is_a_unit_vector_and_nearest_to_its_own(judges):
    images = judge_inputs([draw_scene(s) for s in scenes_of(4, 1)])
    signature = judges.prototype(images[:1])
    assert signature.norm().item() == pytest.approx(1)
    distance = judges.distance(images, signature)
    assert distance[0].item() == pytest.approx(0, abs=1e-5)
    assert distance.argmin() == 0


def test_labels_are_right_and_silent_where_nothing_is():
    scene = scenes_of(1, 1)[0]
    found = labels(scene)
    thing = scene.things[0]
    assert HEADS["count"][found["count"]] == "one"
    assert HEADS["place"][found["place"]] == scene.place
    assert HEADS["kind0"][found["kind0"]] == thing.identity.kind
    assert HEADS["accessory0"][found["accessory0"]] == thing.accessory
    assert {found[name] for name in HEADS if name.endswith("1")} == {-1}
    assert found.keys() == HEADS.keys()


# What they are measured by


def test_auc_of_known_cases():
    low, high = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.7, 0.8, 0.9, 1.0])
    assert auc(low, high) == pytest.approx(1)
    assert auc(high, low) == pytest.approx(0)
    # Of the four pairs, only (0.5, 0.4) is the wrong way round.
    assert auc(torch.tensor([0.1, 0.5]), torch.tensor([0.4, 0.9])) == pytest.approx(0.75)


def test_auc_counts_pairs():
    torch.manual_seed(0)
    positive, negative = torch.rand(40), torch.rand(70) + 0.3
    pairs = (positive[:, None] < negative[None]).float().mean().item()
    assert auc(positive, negative) == pytest.approx(pairs, abs=1e-5)


def test_equal_error_of_known_cases():
    low, high = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.7, 0.8, 0.9])
    threshold = equal_error_threshold(low, high)
    assert 0.3 <= threshold + 1e-6 < 0.7
    positive, negative = torch.tensor([0.1, 0.2, 0.3, 0.6]), torch.tensor([0.4, 0.7, 0.8, 0.9])
    threshold = equal_error_threshold(positive, negative)
    assert (positive > threshold).float().mean() == (negative <= threshold).float().mean() == 0.25


def test_roughening_keeps_shape_range_and_seed():
    images = judge_inputs([draw_scene(s) for s in scenes_of(6, 1)])
    rough = roughen(images, torch.Generator().manual_seed(1), None)
    assert rough.shape == images.shape
    assert rough.abs().max() <= 1
    assert not torch.equal(rough, images)
    assert torch.equal(rough, roughen(images, torch.Generator().manual_seed(1), None))


def test_views_of_an_identity_cover_all_classes():
    crops, kinds = identity_views(np.random.default_rng(0), 8, 4)
    assert crops.shape == (8, 4, 3, 64, 64)
    assert crops.dtype == torch.uint8
    assert set(kinds) == set(HEADS["kind0"])


# Training and files


def test_training_measures_saves_and_loads_the_same_judges(tmp_path):
    trained = Judges(
        train_attributes(tmp_path, None, pictures=24, steps=2),
        train_identity(tmp_path, None, identities=16, steps=2),
        threshold=0.5,
    )
    figures = measure(trained, None, pictures=30, identities=16)
    assert all(0 <= value <= 2 for value in figures.values())
    assert {"clean_accuracy", "rough_accuracy", "identity_auc", "threshold"} <= figures.keys()
    save_judges(trained, tmp_path / "judges", figures)
    assert json.loads((tmp_path / "judges/judges.json").read_text())["held_out"] == figures
    loaded = load_judges(tmp_path / "judges")
    assert loaded.threshold == 0.5
    for before, after in (
        (trained.attributes, loaded.attributes),
        (trained.identity, loaded.identity),
    ):
        assert not after.training
        halves = {
            k: v.half().to(v.dtype) if v.is_floating_point() else v
            for k, v in before.state_dict().items()
        }
        assert halves.keys() == after.state_dict().keys()
        assert all(torch.equal(value, halves[name]) for name, value in after.state_dict().items())


def _cut(folder):
    path = folder / "identity.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _swap(folder):
    (folder / "identity.safetensors").replace(folder / "attributes.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        _swap,
        lambda folder: (folder / "judges.json").unlink(),
        lambda folder: (folder / "attributes.safetensors").unlink(),
        lambda folder: (folder / "identity.safetensors").write_bytes(b""),
        lambda folder: (folder / "judges.json").write_text("{"),
        lambda folder: (folder / "judges.json").write_text("{}"),
        lambda folder: (folder / "judges.json").write_text("[1]"),
        lambda folder: (folder / "judges.json").write_text('{"threshold": NaN}'),
        lambda folder: (folder / "judges.json").write_text('{"threshold": null}'),
    ],
    ids=["cut", "swapped", "no json", "no file", "empty", "bad", "no key", "list", "nan", "null"],
)
def test_damaged_judges_are_refused(judges, tmp_path, damage):
    save_judges(judges, tmp_path, {})
    load_judges(tmp_path)
    damage(tmp_path)
    with pytest.raises(ConceptError, match="judges can't be read"):
        load_judges(tmp_path)


def test_missing_judges_are_told_with_their_folder_and_a_remedy(tmp_path):
    with pytest.raises(ConceptError) as caught:
        load_judges(tmp_path / "nowhere")
    assert "nowhere" in str(caught.value)
    assert "train_storybook" in str(caught.value)


def test_random_scenes_have_labels_for_every_head_there_is():
    rng = np.random.default_rng(5)
    for _ in range(50):
        scene = random_scene(rng, two=0.5)
        for name, index in labels(scene).items():
            assert -1 <= index < len(HEADS[name])


# Training goes on where it was cut off


def fit_small(folder, steps, fail_at=None):
    """Fit a small network with running statistics, as the judges have; gives all its tensors."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
    )
    count = 0

    def loss_of(generator):
        nonlocal count
        count += 1
        if count == fail_at:
            raise KeyboardInterrupt
        return model(torch.randn(8, 4, generator=generator)).square().mean()

    folder.mkdir(exist_ok=True)
    _fit("net", folder, model, loss_of, steps, 1e-2, every=2)
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_judge_that_was_cut_off_ends_as_an_uninterrupted_one(tmp_path):
    expected = fit_small(tmp_path / "whole", 7)
    with pytest.raises(KeyboardInterrupt):
        fit_small(tmp_path / "cut", 7, fail_at=6)
    found = fit_small(tmp_path / "cut", 7)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_finished_judges_stay_as_they_are(tmp_path, judges):
    save_judges(judges, tmp_path, {"identity_auc": 0.75})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert train_judges(tmp_path, None) == {"identity_auc": 0.75}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

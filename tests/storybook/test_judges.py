"""The judges: crops, predictions, prototypes and damaged files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from customize.errors import ConceptError
from customize.storybook.judges import CROPS, HEADS, Judges, crop_thing, judge_inputs, load_judges
from customize.storybook.scene_drawing import draw_scene
from scripts.storybook_training.train_judges import save_judges
from tests.storybook.making import random_judges, random_scenes


@pytest.fixture
def judges() -> Judges:
    return random_judges()


@pytest.mark.parametrize(
    ("where", "things", "slot"), [("single", 1, 0), ("left", 2, 0), ("right", 2, 1)]
)
def test_a_crop_contains_its_thing(where, things, slot):
    left, top, side = CROPS[where]
    assert left >= 0
    assert top >= 0
    assert max(left, top) + side <= 64
    inside = []
    for scene in random_scenes(40, things):
        others = tuple(t for k, t in enumerate(scene.things) if k != slot)
        without = np.asarray(draw_scene(replace(scene, things=others))).astype(int)
        thing = np.abs(np.asarray(draw_scene(scene)) - without).max(axis=2) > 8
        inside.append(thing[top : top + side, left : left + side].sum() / thing.sum())
    assert np.mean(inside) > 0.95
    assert min(inside) > 0.8


def test_left_and_right_crops_show_different_things():
    for scene in random_scenes(10, 2):
        alone = [replace(scene, things=(thing,)) for thing in scene.things]
        both, left, right = judge_inputs([draw_scene(s) for s in (scene, *alone)]).split(1)
        for where, same, other in (("left", left, right), ("right", right, left)):
            near, far = (
                (crop_thing(both, where) - crop_thing(x, where)).abs().mean().item()
                for x in (same, other)
            )
            assert near < 0.05
            assert far > max(0.06, 2 * near)


def test_judge_inputs_are_resized_and_in_range() -> None:
    image = draw_scene(random_scenes(1, 1)[0])
    inputs = judge_inputs([image, image.resize((128, 128))])
    assert inputs.shape == (2, 3, 64, 64)
    assert inputs.min() >= -1
    assert inputs.max() <= 1
    pixels = (inputs[0] + 1).mul(127.5).round().byte().permute(1, 2, 0)
    assert np.array_equal(pixels.numpy(), np.array(image))


def test_judges_predict_one_label_per_head(judges):
    predictions = judges.predict_attributes(
        judge_inputs([draw_scene(s) for s in random_scenes(3, 2)])
    )
    assert len(predictions) == 3
    for row in predictions:
        assert row.keys() == HEADS.keys()
        assert all(label in HEADS[name] for name, label in row.items())


def test_a_prototype_is_a_unit_vector_nearest_to_its_own_image(judges):
    images = judge_inputs([draw_scene(s) for s in random_scenes(4, 1)])
    prototype = judges.prototype(images[:1])
    assert prototype.norm().item() == pytest.approx(1)
    distance = judges.distance(images, prototype)
    assert distance[0].item() == pytest.approx(0, abs=1e-5)
    assert distance.argmin() == 0


def cut_short(folder: Path) -> None:
    path = folder / "identity.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def swap_files(folder: Path) -> None:
    (folder / "identity.safetensors").replace(folder / "attributes.safetensors")


def write_threshold(text: str):
    return lambda folder: (folder / "judges.json").write_text(text)


DAMAGES = {
    "cut short": (cut_short, "724,268"),
    "files swapped": (swap_files, "loading state_dict for AttributeJudge"),
    "no judges.json": (lambda folder: (folder / "judges.json").unlink(), "judges.json"),
    "no weights": (
        lambda folder: (folder / "attributes.safetensors").unlink(),
        "attributes.safetensors",
    ),
    "empty weights": (
        lambda folder: (folder / "identity.safetensors").write_bytes(b""),
        "header is longer than the file",
    ),
    "invalid JSON": (write_threshold("{"), "line 1 column 2"),
    "no threshold": (write_threshold("{}"), "the key 'threshold' is missing"),
    "a list": (write_threshold("[1]"), "list indices"),
    "NaN": (write_threshold('{"threshold": NaN}'), "the threshold nan is not a cosine distance"),
    "null": (write_threshold('{"threshold": null}'), "NoneType"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_judges_are_refused_with_the_reason(
    judges: Judges, tmp_path: Path, name: str
) -> None:
    damage, reason = DAMAGES[name]
    save_judges(judges, tmp_path, {})
    assert load_judges(tmp_path).threshold == judges.threshold
    damage(tmp_path)
    with pytest.raises(ConceptError) as caught:
        load_judges(tmp_path)
    assert caught.value.problem.startswith("the storybook's judges cannot be read: ")
    assert reason in caught.value.problem
    assert caught.value.where == str(tmp_path)


def test_an_error_about_missing_judges_names_the_folder_and_the_script(tmp_path: Path) -> None:
    with pytest.raises(ConceptError) as caught:
        load_judges(tmp_path / "nowhere")
    assert "nowhere" in str(caught.value)
    assert "train_storybook" in str(caught.value)

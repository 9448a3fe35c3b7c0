"""The judges of stickers: boxes, crops, prototypes, distances and damaged files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from customize.errors import ConceptError, DataError
from customize.image_tensors import images_to_tensor
from customize.stickers.judges import (
    Box,
    StickerJudges,
    boxes_of,
    judge_inputs,
    load_sticker_judges,
    shared_part,
)
from customize.stickers.prototypes import Prototypes, compute_prototypes
from customize.stickers.recognition_nets import (
    COLOURS,
    CROP,
    MARGIN,
    BoxJudge,
    SceneJudge,
    SceneMaps,
    StickerJudge,
    crop_squares,
)
from customize.stickers.scene_drawing import draw_scene
from customize.stickers.world import TEXTURES, Scene, Sticker, compose_scene, random_ground
from customize.storybook.bundled_assets import ASSETS
from scripts.storybook_training.train_sticker_judges import save_sticker_judges, scene_loss
from tests.stickers.making import SUBJECTS

SEEDS = st.integers(0, 2**32)
WIDTHS = st.sampled_from((64, 96, 128))


def generator(seed):
    return np.random.default_rng(seed)


def random_scene(seed, count=None, width=64):
    rng = generator(seed)
    count = count or int(rng.integers(1, 4))
    shown = rng.permutation(len(SUBJECTS))[:count]
    return compose_scene(rng, [(SUBJECTS[k], "marker") for k in shown], width=width)


def images_of(artwork, scenes):
    return images_to_tensor([draw_scene(scene, artwork) for scene in scenes])


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


@pytest.fixture(scope="module")
def judges():
    torch.manual_seed(0)
    prototypes = Prototypes(("a", "b", "c"), ("crayon", "marker"), unit(3, 2, 64))
    return StickerJudges(
        SceneJudge().eval(), BoxJudge().eval(), StickerJudge().eval(), prototypes, 0.3
    )


# Boxes


def true_maps(scene):
    """Maps that show exactly the stickers of a scene."""
    rows, columns = 16, scene.width // 4
    centres, squares = torch.full((rows, columns), -9.0), torch.zeros(3, rows, columns)
    x, y = (torch.arange(n) * 4 + 2.0 for n in (columns, rows))
    for sticker in scene.stickers:
        (cx, cy), size = sticker.centre, sticker.size
        distance = torch.hypot(x[None] - cx, y[:, None] - cy)
        near = distance < 8
        centres[near] = (4 - distance)[near]
        squares[:, near] = torch.tensor((cx, cy, float(size)))[:, None]
    return centres, squares


@given(SEEDS, WIDTHS)
def test_boxes_are_read_from_maps(seed, width):
    scene = random_scene(seed, width=width)
    found = boxes_of(*true_maps(scene))
    expected = sorted((Box(s.left, s.top, s.size) for s in scene.stickers), key=lambda b: b.centre)
    assert found == expected


def test_maps_without_a_peak_have_no_box():
    assert boxes_of(torch.full((16, 16), -9.0), torch.zeros(3, 16, 16)) == []


def test_two_peaks_of_one_sticker_are_one_box():
    centres, squares = torch.full((16, 16), -9.0), torch.zeros(3, 16, 16)
    squares[:] = torch.tensor((30.0, 30.0, 40.0))[:, None, None]
    centres[5, 5], centres[9, 9] = 2.0, 3.0
    assert boxes_of(centres, squares) == [Box(10, 10, 40)]


BOXES = st.builds(
    lambda left, top, size: Box(float(left), float(top), float(size)),
    st.integers(-10, 60),
    st.integers(-10, 60),
    st.integers(1, 50),
)


@given(BOXES, BOXES)
def test_the_shared_part_is_counted_in_pixels(first, second):
    grids = []
    for box in (first, second):
        grid = np.zeros((140, 140), bool)
        left, top, size = (int(v) for v in (box.left, box.top, box.size))
        grid[top + 20 : top + 20 + size, left + 20 : left + 20 + size] = True
        grids.append(grid)
    expected = (grids[0] & grids[1]).sum() / (grids[0] | grids[1]).sum()
    assert shared_part(first, second) == pytest.approx(expected)
    assert shared_part(second, first) == pytest.approx(expected)


@settings(max_examples=30)
@given(SEEDS, WIDTHS, st.floats(-6, 6), st.floats(-6, 6), st.floats(0.7, 1.4))
def test_the_loss_is_lowest_at_the_true_squares(seed, width, dx, dy, stretch):
    scene = random_scene(seed, width=width)
    centres, squares = true_maps(scene)
    true = torch.zeros(1, 3, 3)
    for slot, sticker in enumerate(scene.stickers):
        true[0, slot] = torch.tensor((*sticker.centre, float(sticker.size)))
    grounds = torch.tensor([[2, 1]])
    ground = torch.zeros(1, len(COLOURS)), torch.zeros(1, len(TEXTURES))

    def loss(changed):
        return scene_loss(SceneMaps(centres[None], changed[None], *ground), true, grounds).item()

    moved = squares + torch.tensor((dx, dy, 0.0))[:, None, None]
    resized = squares * torch.tensor((1.0, 1.0, stretch))[:, None, None]
    for changed, amount in ((moved, abs(dx) + abs(dy)), (resized, abs(stretch - 1))):
        assert loss(changed) >= loss(squares) - 1e-5
        assert amount < 0.01 or loss(changed) > loss(squares)


# Crops


@settings(max_examples=50)
@given(st.floats(20, 76), st.floats(20, 44), st.floats(8, 36))
def test_a_crop_samples_its_square(x, y, size):
    columns, rows = torch.arange(96) + 0.5, torch.arange(64) + 0.5
    image = torch.stack([columns.expand(64, 96), rows[:, None].expand(64, 96), torch.ones(64, 96)])
    crop = crop_squares(image[None], torch.tensor([0]), torch.tensor([[x, y, size]]))[0]
    assert crop.shape == (3, CROP, CROP)
    steps = MARGIN * size * ((torch.arange(CROP) + 0.5) / CROP - 0.5)
    assert torch.allclose(crop[0], (x + steps).expand(CROP, CROP), atol=1e-3)
    assert torch.allclose(crop[1], (y + steps)[:, None].expand(CROP, CROP), atol=1e-3)


def test_what_is_outside_repeats_the_border():
    image = torch.full((1, 3, 64, 64), 0.25)
    crop = crop_squares(image, torch.tensor([0]), torch.tensor([[2.0, 62.0, 56.0]]))
    assert torch.allclose(crop, torch.tensor(0.25))


def test_stickers_large_small_left_and_right_have_like_crops(artwork):
    ground = random_ground(generator(4), "blue", "plain")
    squares = [(0, 0, 40), (24, 10, 40), (5, 3, 54), (34, 30, 28)]
    scenes = [Scene((Sticker(SUBJECTS[3], "marker", *s),), ground) for s in squares]
    images = images_of(artwork, scenes)
    centres = torch.tensor(
        [(*scene.stickers[0].centre, scene.stickers[0].size) for scene in scenes]
    )
    crops = crop_squares(images, torch.arange(4), centres.float())
    other = images_of(
        artwork, [Scene((replace(scenes[0].stickers[0], subject=SUBJECTS[7]),), ground)]
    )
    far = (crop_squares(other, torch.tensor([0]), centres[:1].float()) - crops[0]).abs().mean()
    for crop in crops[1:]:
        assert (crop - crops[0]).abs().mean() < far / 3


@settings(max_examples=20)
@given(SEEDS, st.integers(0, 16), st.integers(0, 16))
def test_corrections_move_with_the_sticker(seed, right, down):
    torch.manual_seed(seed)
    judge, image = BoxJudge().eval(), torch.rand(1, 3, 64, 64) * 2 - 1
    moved = image.roll((down, right), (2, 3))
    square = torch.tensor([[24.0, 22.0, 20.0]])
    index = torch.tensor([0])
    there = judge(moved, index, square + torch.tensor([[right, down, 0.0]]))
    assert torch.allclose(
        there, judge(image, index, square) + torch.tensor([right, down, 0.0]), atol=1e-3
    )


@given(SEEDS)
def test_edges_are_inside_of_the_crop(seed):
    torch.manual_seed(seed)
    judge, images = BoxJudge().eval(), torch.rand(2, 3, 64, 96) * 2 - 1
    judge.head.weight.data *= 100
    squares = torch.rand(5, 3) * 30 + 10
    edges = judge.edges(images, torch.tensor([0, 1, 1, 0, 0]), squares)
    offsets = (edges - squares[:, :2].repeat(1, 2)).abs() / squares[:, 2:]
    assert edges.shape == (5, 4)
    assert (offsets < 0.75).all()


# Prototypes


@given(SEEDS)
def test_the_nearest_prototype_is_recognised(seed):
    torch.manual_seed(seed)
    prototypes = Prototypes(("a", "b", "c"), ("x", "y"), unit(3, 2, 8))
    flat = [(s, h) for s in prototypes.subjects for h in prototypes.hands]
    assert prototypes.recognise(prototypes.vectors.flatten(0, 1)) == flat
    vectors = unit(5, 8)
    distance = torch.cdist(vectors, prototypes.vectors.flatten(0, 1))
    assert prototypes.recognise(vectors) == [flat[k] for k in distance.argmin(1).tolist()]


def test_prototypes_of_other_hands_are_joined():
    first, second = (Prototypes(("a", "b"), (hand,), unit(2, 1, 8)) for hand in ("x", "y"))
    both = first.joined(second)
    assert both.hands == ("x", "y")
    assert both.recognise(second.vectors[:, 0]) == [("a", "y"), ("b", "y")]
    with pytest.raises(ValueError, match="other subjects"):
        first.joined(replace(second, subjects=("a", "c")))


def test_prototypes_have_a_vector_for_each_subject_and_hand():
    with pytest.raises(ValueError, match="2 subjects in 1 hands"):
        Prototypes(("a", "b"), ("x",), torch.zeros(2, 2, 8))


def test_prototypes_are_those_of_the_artwork(artwork, judges):
    prototypes = compute_prototypes(judges.stickers, artwork, ["marker", "ink"], SUBJECTS[:4])
    assert prototypes.subjects == tuple(subject.id for subject in SUBJECTS[:4])
    assert prototypes.hands == ("marker", "ink")
    assert torch.allclose(prototypes.vectors.norm(dim=2), torch.ones(4, 2))
    again = compute_prototypes(judges.stickers, artwork, ["ink"], SUBJECTS[:4])
    assert torch.allclose(again.vectors[:, 0], prototypes.vectors[:, 1], atol=1e-6)


# Judges


def test_images_are_scaled_to_a_height_of_64():
    images = [Image.new("RGBA", (256, 128), "red"), Image.new("L", (256, 128), 255)]
    inputs = judge_inputs(images)
    assert inputs.shape == (2, 3, 64, 128)
    assert inputs[0, :, 0, 0].tolist() == [1, -1, -1]
    assert (inputs[1] == 1).all()


@pytest.mark.parametrize("width", [64, 88, 128])
def test_grounds_are_named(judges, width):
    grounds = judges.read_grounds(torch.zeros(3, 3, 64, width))
    assert len(grounds) == 3
    assert all(colour in COLOURS and texture in TEXTURES for colour, texture in grounds)


def test_embeddings_are_in_the_order_of_the_boxes(artwork, judges):
    scenes = [random_scene(k, 2) for k in range(3)]
    images = images_of(artwork, scenes)
    boxes = [[Box(s.left, s.top, s.size) for s in scene.stickers] for scene in scenes]
    boxes[1] = []
    together = judges.embed(images, boxes)
    assert together.shape == (4, 64)
    single = [judges.embed(images[k : k + 1], [[box]]) for k in (0, 2) for box in boxes[k]]
    assert torch.allclose(together, torch.cat(single), atol=1e-5)
    assert judges.embed(images, [[], [], []]).shape == (0, 64)


def with_boxes(judges, found):
    """The judges, with boxes given instead of found."""

    class Given(StickerJudges):
        def find_stickers(self, images):
            return found[: len(images)]

    return Given(judges.scenes, judges.boxes, judges.stickers, judges.prototypes, judges.threshold)


def test_the_distance_is_that_of_the_nearest_sticker(artwork, judges):
    scenes = [random_scene(k, count) for k, count in enumerate((1, 2, 1))]
    images = images_of(artwork, scenes)
    boxes = [[Box(s.left, s.top, s.size) for s in scene.stickers] for scene in scenes]
    boxes[2] = []
    known = with_boxes(judges, boxes)
    vectors = judges.embed(images, boxes)
    prototype = known.prototype(images[:1])
    assert torch.allclose(prototype, vectors[0], atol=1e-6)
    distance = known.distance(images, prototype)
    expected = 1 - vectors @ prototype
    assert distance.tolist() == pytest.approx([0, expected[1:].min().item(), 2], abs=1e-5)


def test_a_prototype_is_of_the_largest_sticker_of_each_reference(artwork, judges):
    scene = random_scene(5, 2, 128)
    small, large = sorted(scene.stickers, key=lambda s: s.size)
    boxes = [[Box(s.left, s.top, s.size) for s in (large, small)]]
    images = images_of(artwork, [scene])
    prototype = with_boxes(judges, boxes).prototype(images)
    assert torch.allclose(prototype, judges.embed(images, [boxes[0][:1]])[0], atol=1e-6)
    with pytest.raises(DataError, match="no sticker is found"):
        with_boxes(judges, [[]]).prototype(images)


# Files


def test_judges_are_saved_and_loaded(judges, tmp_path):
    save_sticker_judges(judges, tmp_path, {"auc": 0.5})
    loaded = load_sticker_judges(tmp_path)
    assert loaded.threshold == judges.threshold
    assert loaded.prototypes.subjects == judges.prototypes.subjects
    assert torch.allclose(loaded.prototypes.vectors, judges.prototypes.vectors, atol=1e-3)
    images = torch.rand(2, 3, 64, 96) * 2 - 1
    boxes = [[Box(3, 5, 40)], [Box(20, 0, 56)]]
    assert torch.allclose(loaded.embed(images, boxes), judges.embed(images, boxes), atol=0.01)
    assert not loaded.scenes.training and not loaded.stickers.training


def edit(**changes):
    def change(folder):
        path = folder / "judges.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return change


def swap(folder):
    (folder / "stickers.safetensors").replace(folder / "scenes.safetensors")


def cut(folder):
    path = folder / "stickers.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "cut short": (cut, "stickers.safetensors|incomplete|bytes"),
    "files swapped": (swap, "SceneJudge"),
    "no prototypes": (lambda folder: (folder / "prototypes.safetensors").unlink(), "prototypes"),
    "other subjects": (edit(subjects=["a"]), "1 subjects in 2 hands"),
    "no hands": (edit(hands=None), "the key 'hands' is missing"),
    "a number of hands": (edit(hands=3), "not iterable"),
    "no threshold": (edit(threshold=None), "the key 'threshold' is missing"),
    "a threshold of 3": (edit(threshold=3), "3.0 is not a cosine distance"),
    "invalid JSON": (lambda folder: (folder / "judges.json").write_text("{"), "line 1 column 2"),
    "nothing": (lambda folder: (folder / "judges.json").unlink(), "judges.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_judges_are_refused_with_the_reason(judges, tmp_path, name):
    damage, reason = DAMAGES[name]
    save_sticker_judges(judges, tmp_path, {})
    damage(tmp_path)
    with pytest.raises(ConceptError, match=reason) as caught:
        load_sticker_judges(tmp_path)
    assert caught.value.where == str(tmp_path)
    assert "train_storybook" in str(caught.value)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("any")
    (folder / "judges.json").write_text('{"threshold": 0.5, "subjects": [], "hands": []}')
    (folder / "scenes.safetensors").write_bytes(content)
    with pytest.raises(ConceptError):
        load_sticker_judges(folder)


# The bundled judges, on shapes that they were not trained on


@pytest.fixture(scope="module")
def bundled():
    return load_sticker_judges(ASSETS / "stickers/judges")


@pytest.mark.parametrize("width", [64, 96, 128])
def test_the_bundled_judges_find_stickers_and_read_grounds(artwork, bundled, width):
    scenes = [random_scene(k, width=width) for k in range(40)]
    images = images_of(artwork, scenes)
    close, errors = [], []
    for scene, boxes in zip(scenes, bundled.find_stickers(images), strict=True):
        for sticker in scene.stickers:
            distance = [np.hypot(*np.subtract(b.centre, sticker.centre)) for b in boxes]
            close.append(min(distance, default=99) <= 3)
            if close[-1]:
                errors.append(abs(boxes[int(np.argmin(distance))].size - sticker.size))
        assert abs(len(boxes) - len(scene.stickers)) <= 1
    assert np.mean(close) > 0.9
    assert np.mean(errors) < 3
    grounds = bundled.read_grounds(images)
    for k, name in enumerate(("colour", "texture")):
        right = [g[k] == getattr(s.ground, name) for g, s in zip(grounds, scenes, strict=True)]
        assert np.mean(right) > 0.85, name


def test_the_bundled_judges_tell_new_drawings_apart(artwork, bundled):
    shown = SUBJECTS[:6]
    rng = generator(8)

    def draw(subject, hand, count):
        scenes = [compose_scene(rng, [(subject, hand)]) for _ in range(count)]
        return images_of(artwork, scenes)

    pictures = {(s, hand): draw(s, hand, 4) for s in shown for hand in ("marker", "ink")}
    near, far = [], []
    for subject in shown:
        prototype = bundled.prototype(draw(subject, "marker", 5))
        for pair, images in pictures.items():
            distance = bundled.distance(images, prototype)
            (near if pair == (subject, "marker") else far).append(distance)
    near, far = torch.cat(near), torch.cat(far)
    assert (near[:, None] < far).float().mean() > 0.95
    assert near.median() < bundled.threshold < far.median()

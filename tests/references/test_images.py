"""Reading of reference images: every form that is accepted, and every input that is not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from customize.errors import ConfigError, CustomizeError, DataError
from customize.references.images import (
    MAX_ATTRIBUTE_LENGTH,
    MAX_REFERENCES,
    count_prompts,
    read_group,
    read_groups,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
OTHER = PIXELS[::-1].copy()


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "pictures"
    path.mkdir()
    Image.fromarray(OTHER).save(path / "b.png")
    Image.fromarray(PIXELS).save(path / "a.png")
    (path / "notes.md").write_text("no picture")
    return path


def pixels(group):
    return [np.asarray(reference.image) for reference in group]


def same(group, *expected):
    assert all(reference.image.mode == "RGB" for reference in group)
    return len(group) == len(expected) and all(
        np.array_equal(picture, array)
        for picture, array in zip(pixels(group), expected, strict=True)
    )


def test_one_picture_in_every_form(folder):
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    for value in (
        str(folder / "a.png"),
        folder / "a.png",
        Image.fromarray(PIXELS),
        PIXELS,
        PIXELS / 255.0,
        (PIXELS / 255.0).astype(np.float32),
        tensor,
        tensor.float() / 255,
        tensor.double() / 255,
    ):
        (group,) = read_groups(value, 1)
        assert same(group, PIXELS), type(value)
        assert group[0].attribute == ""
        (group,) = read_groups([value, OTHER], 3)
        assert same(group, PIXELS, OTHER), type(value)
    assert read_group(folder / "a.png")[0].name == str(folder / "a.png")
    assert read_group([PIXELS, OTHER])[1].name == "reference_images[1]"


def test_stacks_are_lists():
    stack = np.stack([PIXELS, OTHER])
    for value in (stack, torch.from_numpy(stack).permute(0, 3, 1, 2), (PIXELS, OTHER)):
        (group,) = read_groups(value, 1)
        assert same(group, PIXELS, OTHER)
    first, second = read_groups([stack, stack[::-1]], 2)
    assert same(first, PIXELS, OTHER)
    assert same(second, OTHER, PIXELS)


def test_reduced_precision_and_gradients_are_read():
    values = torch.full((3, 16, 16), 0.5, dtype=torch.bfloat16, requires_grad=True)
    assert (pixels(read_group(values))[0] == 128).all()


def test_folders_are_sorted_by_name(folder, caplog):
    (group,) = read_groups(folder, 5)
    assert same(group, PIXELS, OTHER)
    assert "notes.md" in caplog.text  # what is left out is said
    first, second = read_groups([folder, str(folder)], 2)
    assert same(first, PIXELS, OTHER)
    assert same(second, PIXELS, OTHER)


def test_lists_of_lists_are_groups_of_prompts():
    first, second = read_groups([[PIXELS], [OTHER, PIXELS]], 2)
    assert same(first, PIXELS)
    assert same(second, OTHER, PIXELS)
    (group,) = read_groups([[PIXELS, OTHER]], 3)  # one group is for all prompts
    assert same(group, PIXELS, OTHER)
    for count in (1, 3):
        with pytest.raises(ConfigError, match="2 groups of reference images were given for"):
            read_groups([[PIXELS], [OTHER]], count)
    with pytest.raises(ConfigError, match="mixes images with lists"):
        read_groups([[PIXELS], OTHER], 2)


def test_attributes_belong_to_their_picture(folder):
    (group,) = read_groups([(PIXELS, "colour"), OTHER, (folder / "a.png", " the  pose ")], 1)
    assert [reference.attribute for reference in group] == ["colour", "", "the pose"]
    assert same(group, PIXELS, OTHER, PIXELS)
    (group,) = read_groups((PIXELS, "colour"), 1)
    assert group[0].attribute == "colour"


@pytest.mark.parametrize("attribute", ["", "  ", "x" * (MAX_ATTRIBUTE_LENGTH + 1)])
def test_attributes_have_a_bounded_length(attribute):
    with pytest.raises(ConfigError, match="an attribute has 1 to 100 characters"):
        read_groups([(PIXELS, attribute)], 1)


def test_a_tuple_of_two_files_is_no_attribute(folder):
    with pytest.raises(ConfigError, match="square brackets"):
        read_groups((str(folder / "a.png"), str(folder / "b.png")), 1)


def test_a_folder_is_no_single_picture(folder):
    for value in [(folder, "colour"), [[folder]], [PIXELS, (str(folder), "colour")]]:
        with pytest.raises(ConfigError, match="is a folder, and a single image is expected"):
            read_groups(value, 1)
    for value in ["", " ", [PIXELS, ""]]:
        with pytest.raises(ConfigError, match="the path is empty"):
            read_groups(value, 1)


def test_colour_modes(tmp_path):
    gray = PIXELS[:, :, 0]
    three = np.repeat(gray[:, :, None], 3, axis=2)
    for value in (gray, gray[:, :, None], torch.from_numpy(gray), Image.fromarray(gray)):
        assert same(read_group(value), three)
    clear = np.dstack([PIXELS, np.zeros((24, 32), np.uint8)])
    for value in (clear, Image.fromarray(clear), torch.from_numpy(clear).permute(2, 0, 1)):
        assert same(read_group(value), np.full_like(PIXELS, 255))  # on white
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert same(read_group(tmp_path / "clear.png"), np.full_like(PIXELS, 255))
    mask = gray > 127
    assert same(read_group(mask), np.where(mask[:, :, None], 255, 0).repeat(3, 2).astype(np.uint8))
    for mode in ("CMYK", "P", "1", "I;16", "LA", "HSV", "F"):
        assert read_group(Image.fromarray(gray).convert(mode))[0].image.mode == "RGB"


def test_exif_rotation_is_applied(tmp_path):
    image = Image.fromarray(PIXELS)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    turned = np.rot90(PIXELS, -1)
    assert same(read_group(tmp_path / "turned.png"), turned)
    with Image.open(tmp_path / "turned.png") as opened:
        assert same(read_group(opened), turned)


def test_nothing_is_resized_and_the_value_is_not_changed():
    small, wide = Image.new("RGB", (16, 16)), Image.new("RGBA", (2000, 17))
    (group,) = read_groups([small, wide], 1)
    assert [reference.image.size for reference in group] == [(16, 16), (2000, 17)]
    assert wide.mode == "RGBA"


def test_animations_give_a_frame_and_a_warning(tmp_path):
    frames = [Image.fromarray(array) for array in (PIXELS, OTHER)]
    path = tmp_path / "moving.png"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match=r"1 animated reference image: .*moving.png \(frame 1\)"):
        assert same(read_group(path), PIXELS)
    with Image.open(path) as opened:
        opened.seek(1)
        with pytest.warns(UserWarning, match=r"reference_images \(frame 2, its current one\)"):
            assert same(read_group(opened), OTHER)
        assert opened.tell() == 1
        with pytest.warns(UserWarning, match="2 animated reference images") as caught:
            read_group([path, opened])
    assert len(caught) == 1


def test_the_same_picture_twice_is_a_warning(folder):
    with pytest.warns(
        UserWarning, match=r"1 repeated reference image again: .*same as reference_images\[0\]"
    ):
        (group,) = read_groups([PIXELS, OTHER, folder / "a.png"], 1)
    assert len(group) == 3
    with pytest.warns(UserWarning, match=r"29 repeated .*\[1\] \(the .* and 19 more") as caught:
        read_group([PIXELS] * 30)
    assert len(caught) == 1
    read_groups([[PIXELS], [PIXELS]], 2)  # in two groups it is none
    read_groups([(PIXELS, "colour"), (PIXELS, "pose")], 1)  # nor for two attributes


def test_the_number_of_pictures_is_bounded(tmp_path):
    picture = Image.new("RGB", (16, 16))
    paths = []
    for number in range(MAX_REFERENCES + 1):
        paths.append(tmp_path / f"{number:03}.png")
        Image.new("RGB", (16, 16), (number, 0, 0)).save(paths[-1])
    assert len(read_group(paths[:MAX_REFERENCES])) == MAX_REFERENCES
    for value in (
        [picture] * 500,
        [[picture] * 500],
        tmp_path,
        np.zeros((65, 16, 16, 3), np.uint8),
    ):
        with pytest.raises(ConfigError, match=f"exceed the limit of {MAX_REFERENCES}"):
            read_groups(value, 1)


@pytest.mark.parametrize(
    "value", [[], (), [[]], [[PIXELS], []], np.zeros((0, 16, 16, 3), np.uint8)]
)
def test_no_pictures(value):
    with pytest.raises(ConfigError, match="there are no reference images"):
        read_groups(value, 2)


@pytest.mark.parametrize(
    "url",
    ["https://example.org/a.png", "HTTP://a/b.jpg", "s3://a/b.png", "data:image/png;base64,AA"],
)
def test_nothing_is_downloaded(url):
    for value in (url, [url], [[url]]):
        with pytest.raises(ConfigError, match="is a URL, and nothing is downloaded"):
            read_groups(value, 1)


def bad_files(folder):
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("hello")
    cut = (folder / "a.png").read_bytes()[:-40]
    (folder / "cut.png").write_bytes(cut)
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (15, 400)).save(folder / "thin.png")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    names = ["empty", "text", "cut", "dot", "thin", "dangling", "missing"]
    return [folder / f"{name}.png" for name in names]


def test_bad_files_are_named(folder):
    for path in bad_files(folder):
        with pytest.raises(DataError) as error:
            read_groups([folder / "b.png", path], 1)
        assert path.name in str(error.value)
        assert error.value.fix


def test_huge_pictures_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for value in (np.zeros((64, 64, 3), np.uint8), Image.new("RGB", (64, 64))):
        with pytest.raises(DataError, match="more than 1000 pixels"):
            read_group(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((16, 16, 5), np.uint8), "shape"),
        (np.zeros((3, 16, 16), np.uint8), "shape"),
        (torch.zeros(16, 16, 3), "shape"),
        (np.zeros(16, np.uint8), "shape"),
        (np.zeros((0, 0, 3), np.uint8), "only 0 x 0"),
        (np.zeros((1, 1, 3), np.uint8), "only 1 x 1"),
        (torch.zeros(3, 15, 64), "only 64 x 15"),
        (np.full((16, 16, 3), np.nan), "not finite"),
        (torch.full((3, 16, 16), torch.inf), "not finite"),
        (np.full((16, 16, 3), 200.0), "values from 200 to 200"),
        (np.full((16, 16, 3), -1.0), "values from -1 to -1"),
        (np.zeros((16, 16, 3), np.int64), "type int64"),
        (np.zeros((16, 16, 3), np.complex64), "type complex64"),
        (np.full((16, 16, 3), "a"), "type <U1"),
        (torch.zeros(3, 16, 16).to_sparse(), "sparse"),
        (None, "cannot be a NoneType"),
        (7, "cannot be a int"),
        ({"dog": [PIXELS]}, "cannot be a dict"),
        (b"abc", "cannot be a bytes"),
        (("a", "colour"), "does not exist|No such file"),
        ((PIXELS, "<|image_pad|>"), "without special tokens"),
        ((PIXELS, "red \ud800"), "without special tokens"),
        ("rex.refs.safetensors", "is an encoded group, and an image is expected"),
        ("adapter.safetensors", "is weights, and an image is expected"),
        ("a\0b.png", "valid file name|null"),
    ],
)
def test_bad_values_are_named(value, message):
    for given, where in ((value, "reference_images"), ([PIXELS, value], "reference_images[1]")):
        with pytest.raises(CustomizeError, match=message) as error:
            read_groups(given, 1)
        assert where in str(error.value) or not str(error.value.where).startswith("reference")


def test_a_damaged_picture_in_memory_is_named(tmp_path):
    path = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        path
    )
    path.write_bytes(path.read_bytes()[:5000])
    with Image.open(path) as opened, pytest.raises(DataError, match="cannot be read"):
        read_group([opened])


def test_prompts_are_counted():
    assert count_prompts({"prompt": "a dog"}) == 1
    assert count_prompts({"prompt": ["a dog", "a cat"]}) == 2
    assert count_prompts({"prompt": None, "prompt_embeds": torch.zeros(3, 4, 5)}) == 3
    assert count_prompts({}) == 1

"""Groups of training images from folders and metadata files."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from customize.errors import DataError
from customize.training.references.image_groups import (
    content_digests,
    read_image_groups,
    targets_with_references,
)
from tests.training.references.tiny_references import make_groups, make_metadata
from tests.training.runs import picture


def test_folder_of_folders(tmp_path):
    groups = read_image_groups(make_groups(tmp_path / "data", (2, 1)), None)
    assert [image.group for image in groups.images] == ["g0", "g0", "g1"]
    assert groups.images[1].captions == ("a photo of dog 1",)
    assert groups.references == [[(1, "")], [(0, "")], []]
    assert groups.num_groups == 2
    assert targets_with_references(groups, tmp_path) == [0, 1]


def test_caption_for_images_without_one(tmp_path):
    folder = make_groups(tmp_path / "data", (2,))
    (folder / "g0" / "1.txt").unlink()
    with pytest.raises(DataError, match=r"1 image has no caption: 1.png"):
        read_image_groups(folder, None)
    assert read_image_groups(folder, "a thing").images[1].captions == ("a thing",)


def test_metadata_file(tmp_path):
    rows = [
        {"group": "a", "image": "x/1.png", "caption": ["one", " a  dog "], "attribute": "colour"},
        {"group": 7, "image": "x/2.png", "caption": "two"},
        {
            "group": 7,
            "image": "3.png",
            "caption": "three",
            "references": [{"image": "x/1.png", "attribute": "shape"}, {"image": "x/2.png"}],
        },
        {"group": "a", "image": "x/4.png", "caption": "four"},
    ]
    groups = read_image_groups(make_metadata(tmp_path, rows), None)
    assert [image.group for image in groups.images] == ["a", "7", "7", "a"]
    assert groups.images[0].captions == ("one", "a dog")
    # The last image takes the colour of the first; the third has references of its own.
    assert groups.references == [[(3, "")], [(2, "")], [(0, "shape"), (1, "")], [(0, "colour")]]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "is not a JSON object"),
        ("[1]", 'is not {"group"'),
        ({"group": "a", "image": "1.png", "caption": "x", "atribute": "colour"}, "unknown keys"),
        ({"image": "1.png", "caption": "x"}, "names no group"),
        ({"group": "a", "caption": "x"}, "names no image"),
        ({"group": "a", "image": "1.png"}, "has no caption for 1.png"),
        ({"group": "a", "image": "1.png", "caption": []}, "neither a text nor a list"),
        ({"group": "a", "image": "1.png", "caption": [3]}, "neither a text nor a list"),
        ({"group": "a", "image": "/etc/1.png", "caption": "x"}, "not in the folder of the file"),
        ({"group": "a", "image": "../1.png", "caption": "x"}, "not in the folder of the file"),
        ({"group": "a", "image": "1.png", "caption": "x", "attribute": 3}, "has an attribute"),
        ({"group": "a", "image": "1.png", "caption": "x", "attribute": "<|a|>"}, "special tokens"),
        ({"group": "a", "image": "1.png", "caption": "x", "references": []}, "has references"),
        (
            {"group": "a", "image": "1.png", "caption": "x", "references": ["1.png"]},
            "has a reference that is not",
        ),
        (
            {"group": "a", "image": "1.png", "caption": "x", "references": [{"image": "1.png"}]},
            "names the image as its own reference",
        ),
        ({"group": "a", "image": "0.png", "caption": "x"}, "names an image again"),
    ],
)
def test_malformed_lines(row, problem, tmp_path):
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.png")
    file = tmp_path / "metadata.jsonl"
    good = {"group": "a", "image": "0.png", "caption": "x"}
    file.write_text(f"{json.dumps(good)}\n\n{row if isinstance(row, str) else json.dumps(row)}\n")
    with pytest.raises(DataError, match="line 3 ") as error:
        read_image_groups(file, None)
    assert problem in error.value.problem


def test_references_must_be_listed(tmp_path):
    row = {"group": "a", "image": "0.png", "caption": "x", "references": [{"image": "9.png"}]}
    with pytest.raises(DataError, match=r"references of 0.png are not listed: 9.png"):
        read_image_groups(make_metadata(tmp_path, [row]), None)


def test_folders_without_groups(tmp_path):
    with pytest.raises(DataError, match="there are no groups in the folder"):
        read_image_groups(tmp_path, None)
    with pytest.raises(DataError, match="the folder of groups cannot be read"):
        read_image_groups(tmp_path / "missing", None)
    with pytest.raises(DataError, match="File name too long"):
        read_image_groups(tmp_path / ("a" * 5000), None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there are no images in the folder"):
        read_image_groups(tmp_path, None)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="the metadata has no lines"):
        read_image_groups(tmp_path / "empty.jsonl", None)


def test_unreadable_image(tmp_path):
    folder = make_groups(tmp_path / "data", (2,))
    (folder / "g0" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="damaged or not an image"):
        read_image_groups(folder, None)
    Image.new("RGB", (16, 16 * 201)).save(folder / "g0" / "1.png")
    with pytest.raises(DataError, match="200:1") as error:
        read_image_groups(folder, None)
    assert error.value.where == str(folder / "g0" / "1.png")


def test_files_that_are_not_read_are_named_once(tmp_path, caplog):
    folder = make_groups(tmp_path / "data", (1,) * 12)
    for group in range(12):
        (folder / f"g{group}" / "notes.md").write_text("mine")
    picture(0).save(folder / "loose.png")
    read_image_groups(folder, None)
    (record,) = caplog.records
    for text in (f"{folder}: loose.png (in no group's folder)", "g0/notes.md", "and 3 more"):
        assert text in record.getMessage()


def test_groups_of_one_image_have_no_targets(tmp_path):
    groups = read_image_groups(make_groups(tmp_path / "data", (1, 1)), None)
    with pytest.raises(DataError, match="every group has one image"):
        targets_with_references(groups, tmp_path)


def test_digests_depend_on_captions_and_references(tmp_path):
    rows = [{"group": "a", "image": f"{n}.png", "caption": "x"} for n in range(3)]
    before = content_digests(read_image_groups(make_metadata(tmp_path, rows), None).images)
    rows[0]["caption"] = ["x", "y"]
    rows[1]["references"] = [{"image": "2.png"}]
    after = content_digests(read_image_groups(make_metadata(tmp_path, rows), None).images)
    assert [before[key] == after[key] for key in before] == [False, False, True]


def test_digests_tell_images_of_the_same_name_apart(tmp_path):
    rows = [{"group": "x", "image": f"{folder}/1.png", "caption": "a cup"} for folder in "abc"]
    target = {"group": "y", "image": "t.png", "caption": "a cup"}

    def digests(reference):
        row = {**target, "references": [{"image": reference}]}
        return content_digests(
            read_image_groups(make_metadata(tmp_path, [*rows, row]), None).images
        )

    first, second = digests("a/1.png"), digests("b/1.png")
    assert list(first) == ["x/1.png", "x/1.png (2)", "x/1.png (3)", "y/t.png"]
    assert {name for name in first if first[name] != second[name]} == {"y/t.png"}

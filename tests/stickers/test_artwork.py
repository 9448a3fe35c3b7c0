"""Reading of artwork: pictures cropped to what is visible, and errors of damaged folders."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from customize.errors import DataError
from customize.stickers.artwork import METADATA, artwork_folder, attribution, read_artwork
from tests.stickers.making import HANDS, SUBJECTS, draw_shape

JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["hands", "subjects", "name", "id"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture
def folder(artwork, tmp_path):
    return shutil.copytree(artwork.folder, tmp_path / "copy")


def change(folder, path, value):
    """Replace a value of the metadata."""
    content = json.loads((folder / METADATA).read_text())
    entry = content
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    (folder / METADATA).write_text(json.dumps(content))


def test_hands_and_subjects_are_read(artwork):
    assert artwork.hands == HANDS
    assert artwork.subjects == SUBJECTS


def test_a_picture_is_cropped_to_what_is_visible(artwork):
    for number, subject in enumerate(SUBJECTS):
        drawn = draw_shape(number, "marker")
        picture = artwork.picture(subject.id, "marker")
        assert picture.mode == "RGBA"
        assert picture.tobytes() == drawn.crop(drawn.getbbox()).tobytes()
        assert picture is artwork.picture(subject.id, "marker")  # read once


def test_faint_shadows_are_cropped(folder):
    pixels = np.zeros((128, 128, 4), np.uint8)
    pixels[:, :, 3] = 10
    pixels[30:50, 20:80, 3] = 200
    Image.fromarray(pixels).save(folder / "ink" / f"{SUBJECTS[0].id}.png")
    assert read_artwork(folder).picture(SUBJECTS[0].id, "ink").size == (60, 20)


def test_missing_artwork_names_the_command(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="make stickers"):
        read_artwork(tmp_path)
    monkeypatch.setenv("CUSTOMIZE_CACHE", str(tmp_path / "cache"))
    assert artwork_folder() == tmp_path / "cache" / "stickers"
    with pytest.raises(DataError, match="artwork of the stickers is missing"):
        read_artwork()


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (["hands"], [], "no hand"),
        (["subjects"], [], "no subject"),
        (["hands", 1, "name"], "crayon", "crayon is listed twice"),
        (["subjects", 1, "id"], SUBJECTS[0].id, "is listed twice"),
        (["subjects", 0, "id"], "../1f600", "not a file name"),
        (["hands", 0, "name"], "/tmp", "not a file name"),
        (["subjects", 2, "synonyms"], [3], "3 is not a text"),
        (["subjects", 2, "version"], None, "NoneType"),
        (["subjects", 2], "snail", "malformed"),
    ],
)
def test_malformed_metadata_is_refused(folder, path, value, reason):
    change(folder, path, value)
    with pytest.raises(DataError, match=reason) as caught:
        read_artwork(folder)
    assert str(folder / METADATA) in str(caught.value)


@given(JSON)
def test_any_json_is_read_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("any")
    (folder / METADATA).write_text(json.dumps(content))
    with pytest.raises(DataError):
        read_artwork(folder)


@pytest.mark.parametrize("content", [None, b"", b"no picture", "cut", "empty"])
def test_unreadable_pictures_are_refused(folder, content):
    path = folder / "crayon" / f"{SUBJECTS[0].id}.png"
    if content is None:
        path.unlink()
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif content == "empty":
        Image.new("RGBA", (8, 8)).save(path)
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match="picture is") as caught:
        read_artwork(folder).picture(SUBJECTS[0].id, "crayon")
    assert str(path) in str(caught.value)


def test_the_attribution_credits_the_hands_of_training(artwork):
    text = attribution(artwork)
    assert "Crayons by the tests (CC0-1.0): https://example.org/crayon" in text
    assert "Markers" in text
    assert "Ink" not in text

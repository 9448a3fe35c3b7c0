"""Changes of a data set are reported by the names of the images."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from customize.concepts.io.file_layout import INFO_FILE
from customize.errors import SettingsError
from customize.training.checkpoint import settings_differences
from customize.training.data.changed_images import combined_hash, describe_changes
from customize.training.recipe import train
from tests.tiny import tiny_sd
from tests.training.runs import settings

NAMES = st.dictionaries(st.text(min_size=1, max_size=5), st.sampled_from("abc"), max_size=6)


@given(NAMES, NAMES)
def test_each_changed_image_is_named_or_counted(before, now):
    description = describe_changes(before, now, "images")
    assert bool(description) == (combined_hash(before) != combined_hash(now))
    if "more" not in description and description and "order" not in description:
        assert all(name in description for name in before.keys() ^ now.keys())


def test_messages_list_changed_images():
    before = {f"{n}.png": "x" for n in range(9)}
    now = {"1.png": "y", **{f"{n}.png": "x" for n in range(4, 9)}, "new.png": "z"}
    assert describe_changes(before, now, "images") == (
        "the images have changed: new.png is new, 0.png, 2.png, 3.png are gone, 1.png is changed "
        "(the image, its caption or its mask)"
    )
    five = {f"{n}.png": "x" for n in range(4)}
    assert "4.png, 5.png, 6.png and 2 more are gone" in describe_changes(before, five, "images")
    back = dict(reversed([("a", "1"), ("b", "2")]))
    assert "order is different" in describe_changes({"a": "1", "b": "2"}, back, "images")


def test_digests_of_earlier_versions_are_compared_as_a_whole():
    files = {"0.png": "x", "1.png": "y"}
    assert not describe_changes(combined_hash(files), files, "images")
    assert settings_differences({"pictures": "0123"}, {"pictures": files}) == [
        "the images, their captions or their masks have changed"
    ]
    assert not settings_differences({"avoid": 4, "density": None}, {"num_shared_directions": 4})[1:]
    assert not settings_differences({"avoid": 4}, {"num_shared_directions": 4})
    before = {"basis": "cosine", "basis_seed": 3, "basis_scale": 0.5}
    now = {"orthogonal_matrix": "cosine", "matrix_seed": 3, "matrix_scale": 0.5}
    assert not settings_differences(before, now)
    assert settings_differences(before | {"basis_seed": 4}, now) == ["matrix_seed was 4 and is 3"]


def test_a_finished_concept_reports_changes_without_publishing_file_names(tmp_path):
    pipe = tiny_sd()
    config = settings(tmp_path, steps=1, checkpoint_every=1)
    train(config, pipe.components, progress=False)
    pictures = sorted((tmp_path / "images").glob("*.png"))
    assert pictures
    facts = (config.output / INFO_FILE).read_text()
    assert not any(path.name in facts for path in pictures)
    assert isinstance(json.loads(facts)["training"]["settings"]["pictures"], str)
    train(config, pipe.components, progress=False)  # the same
    Image.new("RGB", (32, 32), "red").save(pictures[0])
    message = f"the images have changed: {pictures[0].name} is changed"
    with pytest.raises(SettingsError, match=message):
        train(config, pipe.components, progress=False)

import warnings

import pytest
from PIL import Image

from customize.families import family_of
from customize.training.run_summary import (
    format_summary,
    split_unknown_word,
    summarize_run,
    warn_about_data,
)
from tests.tiny import tiny_sd
from tests.training.runs import make_various, picture, read_images, settings


@pytest.fixture(scope="module")
def family():
    return family_of(tiny_sd().components)


def test_summary_has_the_counts_of_a_run(family, tmp_path):
    make_various(tmp_path)
    (tmp_path / "images" / "0.caption").write_text("<rex> asleep")
    config = settings(tmp_path, buckets=True, masks=tmp_path / "masks", steps=800)
    samples = read_images(config)
    summary = summarize_run(config, samples, [], family, 32, processes=2)
    assert summary == {
        "images": "5",
        "captions": "1 from files, 4 from the template",
        "masks": "5",
        "size": "4 buckets: 40 x 24 (2), 16 x 64 (1), 32 x 32 (1), 64 x 16 (1)",
        "steps, epochs": "800 steps of 4 images, 640 epochs",
    }
    lines = format_summary(config, summary).splitlines()
    assert all(len(line) <= 80 for line in lines) and "640 epochs" in lines[-1]
    few = format_summary(config, {"steps, epochs": "12 steps of 2 images, " + "word " * 20 + "end"})
    assert few.endswith(" end") and all(len(line) <= 80 for line in few.splitlines())


def collect_warnings(config, family, resolution=32):
    samples = read_images(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_about_data(config, samples, family, resolution)
    return [str(warning.message) for warning in caught]


def test_data_that_is_unlikely_to_be_learned_is_warned_of(family, tmp_path):
    assert collect_warnings(settings(tmp_path / "a", steps=800), family) == []
    samples = read_images(settings(tmp_path / "a"))
    summary = summarize_run(settings(tmp_path / "a"), samples, [], family, 32, processes=1)
    assert summary["steps, epochs"] == (
        "12 steps of 2 images, 8.0 epochs; usual are some hundreds of steps"
    )
    (message,) = collect_warnings(settings(tmp_path / "a", steps=800, class_word="xqzvw"), family)
    assert "does not know the class word 'xqzvw': it reads " in message
    for name in ("a.png", "b.png"):
        (tmp_path / "b" / "images").mkdir(parents=True, exist_ok=True)
        picture(0, 20).save(tmp_path / "b" / "images" / name)
    small, twice = collect_warnings(settings(tmp_path / "b", steps=800), family)
    assert "2 images are smaller than 32 x 32 pixels" in small and "a.png, b.png" in small
    assert "1 of 2 images are duplicates: b.png as a.png" in twice


@pytest.mark.parametrize("word", ["dog", "toy dog", "photo"])
def test_tokenizers_know_common_words(word, family):
    assert split_unknown_word(family, word) == []


def test_words_of_the_bundled_base_are_known():
    from transformers import AutoTokenizer

    from customize.families.pipeline_components import TokenDictionary

    tokenizer = AutoTokenizer.from_pretrained("assets/storybook/tokenizer")

    class Family:
        def token_dictionaries(self):
            return [TokenDictionary("text_encoder", tokenizer, None)]

    assert split_unknown_word(Family(), "dog") == [] == split_unknown_word(Family(), "robot")
    assert split_unknown_word(Family(), "striped zebra") == ["z", "e", "b", "r", "a"]


def test_wide_images_of_sufficient_height_are_not_warned_of(family, tmp_path):
    Image.new("RGB", (64, 30), "red").save(tmp_path / "x.png")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 30), "red").save(tmp_path / "images" / "x.png")
    assert collect_warnings(settings(tmp_path, steps=800), family) == []

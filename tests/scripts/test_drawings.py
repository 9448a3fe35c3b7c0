"""scripts/bench/_worlds: drawings by hand, and pictures of them with captions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from customize.stickers.artwork import artwork_folder, read_artwork
from customize.stickers.caption_grammar import training_wording
from customize.stickers.subjects import training_split
from customize.training.data.dataset import read_training_images
from scripts.bench._worlds import drawings


def on_grey(picture: Image.Image) -> np.ndarray:
    """A drawing on grey at 40 pixels, in [0, 1]."""
    ground = Image.new("RGBA", picture.size, "#808080")
    ground.alpha_composite(picture)
    return np.asarray(ground.convert("RGB").resize((40, 40))) / 255


def test_drawings_are_cut_out_and_have_dark_outlines():
    assert len({drawing.name for drawing in drawings.DRAWINGS}) == 10
    for drawing in drawings.DRAWINGS:
        picture = drawing.picture()
        assert picture.mode == "RGBA" and picture.size == (128, 128)
        assert picture.tobytes() == drawing.picture().tobytes()
        pixels = np.asarray(picture)
        opaque = pixels[..., 3] > 250
        assert 0.2 < opaque.mean() < 0.7
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert not edge[:, 3].any(), f"{drawing.name} is cut by the border"
        dark = opaque & (pixels[..., :3].max(-1) < 70)
        assert 0.1 < dark.sum() / opaque.sum() < 0.45, drawing.name


def test_drawings_differ_at_40_pixels():
    pictures = [on_grey(drawing.picture()) for drawing in drawings.DRAWINGS]
    for first, second in itertools.combinations(pictures, 2):
        assert np.abs(first - second).mean() > 0.08


def test_pictures_differ_in_size_place_and_ground():
    photos = drawings.photos(drawings.DRAWINGS[0], 3)
    assert [p.image.tobytes() for p in photos] == [
        p.image.tobytes() for p in drawings.photos(drawings.DRAWINGS[0], 3)
    ]
    assert photos[0].image.tobytes() != drawings.photos(drawings.DRAWINGS[0], 4)[0].image.tobytes()
    assert [photo.image.size for photo in photos] == [(64, 64)] * 5
    captions = [photo.caption for photo in photos]
    assert sum("a large {}" in text for text in captions) == 2
    assert sum("a small {}" in text for text in captions) == 1
    assert len({text.split()[-2] for text in captions}) == 5  # colours of the grounds
    assert all(text.startswith("a sticker of ") and text.count("{}") == 1 for text in captions)


def test_pictures_are_written_as_training_reads_them(tmp_path):
    drawing = drawings.DRAWINGS[1]
    drawings.write_photos(drawing, tmp_path / "ghost", 0)
    images = read_training_images(tmp_path / "ghost", trigger=f"<{drawing.name}>")
    expected = [p.caption.replace("{}", "<ghost>") for p in drawings.photos(drawing, 0)]
    assert [image.caption for image in images] == expected


@pytest.mark.skipif(not artwork_folder().is_dir(), reason="needs the artwork of `make stickers`")
def test_captions_of_the_base_know_the_class_words():
    known = set(training_wording(training_split(read_artwork())).words())
    assert {drawing.class_word for drawing in drawings.DRAWINGS} <= known

import csv
import json
import logging
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, features

from customize.errors import DataError
from customize.training.data.dataset import (
    image_tensor,
    load_image_and_mask,
    mask_tensor,
    read_image,
    read_mask,
    read_training_images,
)


def gradient(width=40, height=30, seed=0):
    """Three smooth ramps with a hue by seed; all corners differ."""
    x = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    blue = np.full((height, width), (37 * seed) % 256)
    return Image.fromarray(np.stack([x, y, blue], -1).round().astype(np.uint8))


def saved(folder, name, image=None, **options):
    path = folder / name
    (image or gradient()).save(path, **options)
    return path


def read_one(folder, **options):
    (sample,) = read_training_images(folder, trigger="<rex>", **{"caption": "a {}", **options})
    return sample


def refused(call, *args, **kwargs):
    with pytest.raises(DataError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    assert caught.value.fix
    return caught.value


def close(image, expected, tolerance):
    difference = np.abs(np.asarray(image, np.float64) - np.asarray(expected, np.float64))
    return difference.max() <= tolerance


# Files and their order


def test_all_image_suffixes_in_any_case_sorted_by_name(tmp_path):
    for name in ["d.WEBP", "b.JPeG", "a.png", "c.JPG"]:
        saved(tmp_path, name)
    (tmp_path / "notes.md").write_text("not a picture")
    (tmp_path / "scan.tif").write_bytes(b"II*")
    (tmp_path / "._a.png").write_bytes(b"macOS leaves such files")
    samples = read_training_images(tmp_path, trigger="<rex>", caption="a {}")
    assert [sample.path.name for sample in samples] == ["a.png", "b.JPeG", "c.JPG", "d.WEBP"]
    assert all(sample.image.mode == "RGB" for sample in samples)
    assert [
        s.path.name for s in read_training_images(tmp_path, trigger=None, caption="x", limit=2)
    ] == [
        "a.png",
        "b.JPeG",
    ]


def test_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    error = refused(read_one, tmp_path)
    assert "no images" in str(error) and error.where == str(tmp_path)
    (tmp_path / "more.png").mkdir()
    error = str(refused(read_one, tmp_path))
    assert "only notes.txt, more.png (subfolders are not searched)" in error
    (tmp_path / "b.heic").write_bytes(b"x")
    assert "only notes.txt, b.heic (needs pip install pillow-heif)" in str(
        refused(read_one, tmp_path)
    )


def test_subfolders_are_ignored_with_a_warning(tmp_path, caplog):
    saved(tmp_path, "a.png")
    (tmp_path / "more").mkdir()
    saved(tmp_path / "more", "b.png")
    with caplog.at_level(logging.WARNING):
        assert read_one(tmp_path).path.name == "a.png"
    assert "more" in caplog.text


def test_images_of_other_formats_are_ignored_with_a_warning(tmp_path, caplog):
    saved(tmp_path, "a.png")
    for name in ("b.HEIC", "c.gif", "d.txt", "e.bmp"):
        (tmp_path / name).write_text("a <rex>")
    with caplog.at_level(logging.WARNING):
        assert read_one(tmp_path).path.name == "a.png"
    assert "b.HEIC (needs pip install pillow-heif), c.gif (save it as PNG)" in caplog.text
    assert "d.txt (no image of that name)" in caplog.text


def test_unreadable_folder_is_refused(tmp_path):
    assert "No such file" in str(refused(read_one, tmp_path / "none"))
    assert "Not a directory" in str(refused(read_one, saved(tmp_path, "a.png")))


# Captions


def test_caption_files_precede_metadata_and_template(tmp_path):
    for name in ["a.png", "b.png", "c.png"]:
        saved(tmp_path, name)
    (tmp_path / "a.TXT").write_bytes(b"\xef\xbb\xbf a photo of <rex>\r\n  asleep\n")
    rows = [{"file_name": n, "text": f"<rex> in {n}"} for n in ("a.png", "b.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    samples = read_training_images(tmp_path, trigger="<rex>", caption="a {} and {{}}")
    assert [sample.caption for sample in samples] == [
        "a photo of <rex> asleep",
        "<rex> in b.png",
        "a <rex> and {<rex>}",
    ]


def test_captions_without_the_trigger_are_all_named(tmp_path):
    for name in ["a.png", "b.png", "c.png"]:
        saved(tmp_path, name)
    (tmp_path / "a.txt").write_text("a dog")
    (tmp_path / "c.txt").write_text("rex the dog")
    error = refused(read_one, tmp_path)
    assert "2 images have a caption without the trigger <rex>: a.png, c.png" in str(error)
    assert len(read_training_images(tmp_path, trigger=None, caption="a dog")) == 3


def test_triggers_are_found_in_any_case_as_they_are_expanded(tmp_path):
    saved(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("a <REX>")
    assert read_one(tmp_path).caption == "a <REX>"
    error = refused(read_training_images, tmp_path, trigger=None, forbidden=["<rex>"])
    assert "1 image has a caption with the trigger <rex>: a.png" in str(error)


def test_captions_with_lone_surrogates_are_refused(tmp_path):
    saved(tmp_path, "a.png")
    line = '{"file_name": "a.png", "text": "lone \\ud800 <rex>"}'
    (tmp_path / "metadata.jsonl").write_text(line)
    assert "line 1 has a lone surrogate for a.png" in str(refused(read_one, tmp_path))
    (tmp_path / "metadata.jsonl").write_text(line.replace("ud800", "ud83d\\udc36"))
    assert read_one(tmp_path).caption == "lone 🐶 <rex>"


def test_missing_captions_are_all_named(tmp_path):
    for name in ["a.png", "b.png", "c.png"]:
        saved(tmp_path, name)
    (tmp_path / "a.txt").write_text("<rex>")
    (tmp_path / "b.txt").write_text(" \n")
    error = refused(read_one, tmp_path, caption=None)
    assert "2 images have no caption: b.png, c.png" in str(error)


def test_caption_that_is_not_utf8_is_refused(tmp_path):
    saved(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(b"<rex> \xff")
    error = refused(read_one, tmp_path)
    assert "not UTF-8" in str(error) and "a.txt" in error.where


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{broken", "is not {"),
        ("[1, 2]", "is not {"),
        ('{"file_name": "a.png"}', "is not {"),
        ('{"file_name": "a.png", "text": 5}', "is not {"),
        ('{"file_name": "a.png", "text": "<rex>"}', "lists a.png again"),
        ('{"file_name": "../a.png", "text": "<rex>"}', "not an image in the folder"),
        ("[" * 100_000, "is not {"),
    ],
)
def test_invalid_metadata_is_refused_by_line(tmp_path, line, says):
    saved(tmp_path, "a.png")
    good = '{"file_name": "a.png", "text": "<rex>"}\n'
    (tmp_path / "metadata.jsonl").write_text(good + line)
    error = refused(read_one, tmp_path)
    assert "line 2" in str(error) and says in str(error)
    assert error.where.endswith("metadata.jsonl")


def test_metadata_may_contain_line_separators(tmp_path):
    saved(tmp_path, "a.png")
    row = json.dumps({"file_name": "a.png", "text": "<rex>\u2028asleep"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(row, encoding="utf-8")
    assert read_one(tmp_path).caption == "<rex> asleep"


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("0", "0.caption"),
        ("0", "0.TXT"),
        ("0", "0.png.txt"),
        ("IMG_1", "img_1.txt"),
        ("caf\u00e9", "cafe\u0301.txt"),  # as macOS writes it
    ],
)
def test_caption_files_belong_to_the_image_of_their_name(stem, name, tmp_path, caplog):
    saved(tmp_path, f"{stem}.png")
    (tmp_path / name).write_text("<rex> asleep")
    sample = read_one(tmp_path)
    assert (sample.caption, sample.templated, caplog.text) == ("<rex> asleep", False, "")


def test_ambiguous_caption_files_are_ignored(tmp_path, caplog):
    saved(tmp_path, "A.png"), saved(tmp_path, "a.png")
    (tmp_path / "A.txt").write_text("a <rex> in A")
    samples = read_training_images(tmp_path, trigger="<rex>", caption="a {}")
    assert [(s.caption, s.templated) for s in samples] == [
        ("a <rex> in A", False),
        ("a <rex>", True),
    ]
    (tmp_path / "A.txt").rename(tmp_path / "A.PNG.txt")
    with caplog.at_level(logging.WARNING):
        assert all(
            s.templated for s in read_training_images(tmp_path, trigger="<rex>", caption="a {}")
        )
    assert "A.PNG.txt (no image of that name)" in caplog.text


def test_images_of_one_stem_share_a_caption(tmp_path):
    saved(tmp_path, "0.png"), saved(tmp_path, "0.jpg")
    (tmp_path / "0.txt").write_text("<rex>")
    samples = read_training_images(tmp_path, trigger="<rex>", caption="a {}")
    assert [sample.caption for sample in samples] == ["<rex>", "<rex>"]


def test_the_first_of_several_captions_is_used_and_others_are_named(tmp_path, caplog):
    saved(tmp_path, "0.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,<rex> by csv\n")
    assert read_one(tmp_path).caption == "<rex> by csv"
    row = {"file_name": "0.png", "text": "<rex> by jsonl"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert read_one(tmp_path).caption == "<rex> by jsonl"
    assert "metadata.csv for 0.png (metadata.jsonl is used)" in caplog.text
    for name in ("0.caption", "0.png.txt", "0.txt"):
        (tmp_path / name).write_text(f"<rex> by {name}")
        caplog.clear()
        assert read_one(tmp_path).caption == f"<rex> by {name}"
    for ignored in (
        "0.caption (0.txt is used)",
        "0.png.txt (0.txt is used)",
        "the metadata of 0.png",
    ):
        assert ignored in caplog.text
    (tmp_path / "0.TXT").write_text("<rex> by\n0.txt")  # the same words
    assert read_one(tmp_path).caption == "<rex> by 0.txt"
    (tmp_path / "0.TXT").write_text("<rex> by others")
    assert "0.TXT and 0.txt are different captions of 0.png" in str(refused(read_one, tmp_path))


def test_unused_files_are_named(tmp_path, caplog):
    saved(tmp_path, "0.png"), saved(tmp_path, "1.jfif", format="JPEG")
    for name in ("7.txt", "photo", "metadata.parquet", "notes.md", ".b.png", "c.tiff"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("Thumbs.db", ".DS_Store", "._0.png", ".gitignore", "desktop.ini"):
        (tmp_path / name).write_bytes(b"x")
    samples = read_training_images(tmp_path, trigger="<rex>", caption="a {}")
    assert [sample.path.name for sample in samples] == ["0.png", "1.jfif"]
    (record,) = caplog.records
    assert record.getMessage() == (
        f"Left out in {tmp_path}: 7.txt (no image of that name), .b.png (hidden), c.tiff (save it"
        " as PNG), metadata.parquet, notes.md, photo (no suffix)"
    )


def test_long_lists_of_names_are_truncated(tmp_path, caplog):
    saved(tmp_path, "0.png")
    for number in range(300):
        (tmp_path / f"x{number:03}.txt").write_text("x")
    read_one(tmp_path)
    assert "x009.txt (no image of that name) and 290 more" in caplog.text
    assert len(caplog.text) < 1000


@pytest.mark.parametrize("name", ["1.png", "0.txt", "metadata.csv"])
@pytest.mark.parametrize("kind", ["dangling", "fifo"])
def test_dangling_links_and_special_files_are_refused(name, kind, tmp_path):
    saved(tmp_path, "0.png")
    if kind == "dangling":
        (tmp_path / name).symlink_to(tmp_path / "gone.png")
    else:
        os.mkfifo(tmp_path / name)
    problem = "gone.png, which does not exist" if kind == "dangling" else "is not a regular file"
    error = str(refused(read_one, tmp_path))
    assert name in error and problem in error


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl", "metadata.csv"])
def test_byte_order_marks_determine_the_encoding(encoding, name, tmp_path):
    saved(tmp_path, "a.png")
    text = {
        "a.txt": "<rex>, caf\u00e9",
        "metadata.jsonl": json.dumps({"file_name": "a.png", "text": "<rex>, caf\u00e9"}),
        "metadata.csv": 'file_name,text\r\na.png,"<rex>, caf\u00e9"\r\n',
    }[name]
    mark = "\ufeff" if encoding == "utf-16-le" else ""
    (tmp_path / name).write_bytes((mark + text).encode(encoding))
    assert read_one(tmp_path).caption == "<rex>, caf\u00e9"


@given(
    captions=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20), max_size=4
    ),
    delimiter=st.sampled_from(",;\t"),
    swapped=st.booleans(),
)
def test_csv_tables_round_trip(captions, delimiter, swapped, tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    captions = [f"<rex> {text}" for text in captions] or ["<rex>"]
    columns = ["text", "other", "file_name"] if swapped else ["file_name", "text", "other"]
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, delimiter=delimiter)
        writer.writeheader()
        for number, text in enumerate(captions):
            saved(folder, f"{number}.png", Image.new("L", (16, 16)))
            writer.writerow({"file_name": f"{number}.png", "text": text, "other": "x"})
    samples = read_training_images(folder, trigger="<rex>", caption="a {}")
    assert [s.caption for s in samples] == [" ".join(text.split()) for text in captions]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("a.png,<rex> again", "lists a.png again"),
        ("b.png,<rex>", "b.png, which is not an image in the folder"),
        ("a.png,<rex>, sitting", "has 3 columns and the header 2"),
        ("a.png", "has 1 columns and the header 2"),
        ('a.png,"<rex>', "is not valid CSV"),
    ],
)
def test_invalid_tables_are_refused_by_line(row, says, tmp_path):
    saved(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text(f"file_name,text\na.png,<rex>\n{row}\n")
    error = refused(read_one, tmp_path)
    assert "line " in str(error) and says in str(error) and error.where.endswith("metadata.csv")


def test_tables_without_captions_are_named(tmp_path, caplog):
    saved(tmp_path, "a.png")
    for text in ("file_name,label\na.png,3\n", ""):
        (tmp_path / "metadata.csv").write_text(text)
        caplog.clear()
        assert read_one(tmp_path).templated
        assert "metadata.csv (has no columns file_name and text)" in caplog.text


def test_mask_names_ignore_case_and_unused_masks_are_named(masked, caplog):
    pictures, masks = masked
    (masks / "a.png").rename(masks / "A.PNG")
    saved(masks, "z.png", Image.new("L", (40, 30), 255))
    assert read_one(pictures, masks=masks).mask is not None
    assert "z.png (no image of that name)" in caplog.text


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif(tmp_path):
    saved(tmp_path, "a.avif", quality=95)
    assert close(read_one(tmp_path).image, gradient(), 24)


# Colours and sizes


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = gradient(40, 30)
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for step in undo.get(orientation, []):
        stored = stored.transpose(step)
    image = read_image(saved(tmp_path, "a.png", stored, exif=exif))
    assert image.size == (40, 30)
    assert close(image, upright, 0)


def test_cmyk_is_converted(tmp_path):
    path = saved(tmp_path, "a.jpg", Image.new("CMYK", (32, 32), (0, 255, 255, 0)))
    with Image.open(path) as stored:
        assert stored.mode == "CMYK"
    assert close(read_image(path), Image.new("RGB", (32, 32), (255, 0, 0)), 4)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grayscale_is_converted(tmp_path, mode):
    gray = gradient().convert(mode)
    assert close(read_image(saved(tmp_path, "a.png", gray)), gray.convert("RGB"), 0)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    levels = np.linspace(0, 65535, 32 * 32).round().astype(np.uint16).reshape(32, 32)
    path = saved(tmp_path, "a.png", Image.fromarray(levels))
    with Image.open(path) as stored:
        assert stored.mode.startswith("I")
    image = read_image(path)
    expected = np.repeat((levels / 257.0)[..., None], 3, axis=2)
    assert close(image, expected, 0.5)
    assert np.asarray(image).min() == 0 and np.asarray(image).max() == 255


def test_transparency_is_composited_on_white(tmp_path):
    image = gradient().convert("RGBA")
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, 20, 30))
    alpha.paste(128, (20, 0, 30, 30))
    image.putalpha(alpha)
    result = np.asarray(read_image(saved(tmp_path, "a.png", image)), np.float64)
    plain = np.asarray(gradient(), np.float64)
    assert (result[:, :20] == 255).all()
    mixed = plain[:, 20:30] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(result[:, 20:30] - mixed).max() <= 1
    assert (result[:, 30:] == plain[:, 30:]).all()


@pytest.mark.parametrize("mode", ["LA", "P", "webp"])
def test_transparency_of_other_modes_is_composited_on_white(tmp_path, mode):
    image = Image.new("RGBA", (32, 32), (200, 200, 200, 255))
    image.paste((10, 10, 10, 0), (0, 0, 16, 32))
    if mode == "webp":
        path = saved(tmp_path, "a.webp", image, lossless=True)
    elif mode == "P":
        palette = image.convert("RGB").quantize(4)
        clear = palette.getpixel((0, 0))
        path = saved(tmp_path, "a.png", palette, transparency=clear)
    else:
        path = saved(tmp_path, "a.png", image.convert("LA"))
    result = read_image(path)
    assert result.getpixel((4, 4)) == (255, 255, 255)
    assert result.getpixel((24, 4)) == (200, 200, 200)


def test_palette_is_converted(tmp_path):
    palette = gradient().quantize(64)
    assert close(read_image(saved(tmp_path, "a.png", palette)), palette.convert("RGB"), 0)


def test_embedded_profiles_are_honoured(tmp_path):
    """A profile with red and blue primaries exchanged must exchange the channels."""
    swapped = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = swapped.index(b"rXYZ", 128), swapped.index(b"bXYZ", 128)
    swapped[red : red + 4], swapped[blue : blue + 4] = b"bXYZ", b"rXYZ"
    path = saved(tmp_path, "a.png", gradient(), icc_profile=bytes(swapped))
    expected = np.asarray(gradient())[..., ::-1]
    assert close(read_image(path), expected, 2)
    broken = saved(tmp_path, "b.png", gradient(), icc_profile=b"nothing of the kind")
    assert close(read_image(broken), gradient(), 0)


def test_first_image_of_a_multi_picture_jpeg_is_used(tmp_path):
    path = tmp_path / "a.jpg"
    depth = Image.new("RGB", (20, 20))
    gradient().save(path, format="MPO", save_all=True, append_images=[depth], quality=95)
    with Image.open(path) as stored:
        assert stored.format == "MPO"
    assert close(read_image(path), gradient(), 16)


# Refused images


@pytest.mark.parametrize("name", ["a.webp", "a.png"])
def test_animated_images_are_refused(tmp_path, name):
    frames = [gradient(seed=i) for i in range(3)]
    path = saved(tmp_path, name, frames[0], save_all=True, append_images=frames[1:], duration=50)
    error = refused(read_image, path)
    assert "animated" in str(error) and error.where == str(path)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_truncated_images_are_refused(tmp_path, name, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path, name, Image.fromarray(noise))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    error = refused(read_one, tmp_path)
    assert error.where == str(path)


def test_corrupt_images_are_refused(tmp_path):
    path = saved(tmp_path, "a.png", gradient(200, 200))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    path.write_bytes(content)
    assert refused(read_image, path).where == str(path)


@pytest.mark.parametrize(
    "content", [b"GIF89a" + bytes(50), b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<html></html>", b""]
)
def test_images_of_unknown_formats_are_refused(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    error = refused(read_one, tmp_path)
    assert "damaged or not an image" in str(error) and "a.jpg" in error.where


@pytest.mark.parametrize("size", [(1, 1), (15, 300), (300, 15)])
def test_images_that_are_too_small_are_refused(tmp_path, size):
    error = refused(read_image, saved(tmp_path, "a.png", Image.new("RGB", size)))
    assert f"only {size[0]} x {size[1]} pixels" in str(error)


@pytest.mark.parametrize("side", [10_000, 30_000])
def test_decompression_bomb_is_never_decoded(tmp_path, side):
    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    # The data is invalid, and decoding it would give another message.
    path = tmp_path / "a.png"
    content = chunk(b"IHDR", header) + chunk(b"IDAT", b"garbage") + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        error = refused(read_image, path)
    assert "may be an attack" in str(error)


# Masks


@pytest.fixture
def masked(tmp_path):
    pictures, masks = tmp_path / "pictures", tmp_path / "masks"
    pictures.mkdir()
    masks.mkdir()
    saved(pictures, "a.jpg")
    half = Image.new("L", (40, 30), 0)
    half.paste(255, (20, 0, 40, 30))
    saved(masks, "a.png", half)
    return pictures, masks


def test_masks_are_transformed_like_their_images(masked):
    sample = read_one(masked[0], masks=masked[1])
    mask = mask_tensor(sample, 4)
    assert mask.shape == (1, 4, 4) and mask.dtype == torch.float32
    assert mask[0].tolist() == [[0.0, 0.0, 1.0, 1.0]] * 4
    assert mask_tensor(sample, 1).item() == pytest.approx(0.5, abs=0.01)
    early = read_one(masked[0], masks=masked[1], resolution=16)
    assert torch.equal(mask_tensor(early, 4), mask)


def test_without_a_mask_the_whole_image_is_used(masked):
    assert torch.equal(mask_tensor(read_one(masked[0]), 3), torch.ones(1, 3, 3))


def test_missing_masks_are_refused(masked):
    saved(masked[0], "b.png")
    saved(masked[0], "c.png")
    error = refused(read_one, masked[0], masks=masked[1])
    assert "2 images have no mask: b.png, c.png" in str(error)


def test_two_masks_for_one_image_are_refused(masked):
    saved(masked[1], "a.webp")
    assert "a.png and a.webp" in str(refused(read_one, masked[0], masks=masked[1]))


def test_masks_of_another_size_are_refused(masked):
    path = saved(masked[1], "a.png", Image.new("L", (30, 40), 255))
    error = refused(read_one, masked[0], masks=masked[1])
    assert "the mask is 30 x 40 pixels and its image 40 x 30" in str(error)
    assert error.where == str(path)


def test_black_masks_are_refused(masked):
    saved(masked[1], "a.png", Image.new("L", (40, 30), 0))
    assert "black all over" in str(refused(read_one, masked[0], masks=masked[1]))


def test_masks_that_are_black_in_the_centre_square_are_refused(masked):
    mask = Image.new("L", (40, 30), 0)
    mask.paste(255, (0, 0, 4, 30))
    saved(masked[1], "a.png", mask)
    assert "black all over the centre" in str(refused(read_one, masked[0], masks=masked[1]))
    mask.paste(255, (4, 0, 7, 30))
    saved(masked[1], "a.png", mask)
    assert read_one(masked[0], masks=masked[1]).mask is not None


def test_masks_by_transparency_and_of_sixteen_bits(tmp_path):
    cut = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    cut.paste((255, 255, 255, 255), (0, 0, 16, 32))
    mask = read_mask(saved(tmp_path, "a.png", cut), (32, 32))
    assert mask.mode == "L"
    assert (mask.getpixel((4, 4)), mask.getpixel((24, 4))) == (255, 0)
    deep = Image.fromarray(np.full((32, 32), 32896, np.uint16))
    assert read_mask(saved(tmp_path, "b.png", deep), (32, 32)).getpixel((0, 0)) == 128


# Tensors


def test_pixels_are_the_centre_square_in_range(tmp_path):
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste((0, 0, 255), (30, 0, 60, 30))
    wide.putpixel((45, 15), (255, 255, 255))
    saved(tmp_path, "a.png", wide)
    sample = read_one(tmp_path)
    exact = image_tensor(sample, 30)
    assert exact.shape == (3, 30, 30) and exact.dtype == torch.float32 and exact.is_contiguous()
    assert exact[:, 0, 0].tolist() == [-1.0, -1.0, 1.0]
    assert exact[:, 15, 15].tolist() == [1.0, 1.0, 1.0]
    assert image_tensor(sample, 47).min() >= -1.0 and image_tensor(sample, 47).max() <= 1.0


def test_pixels_equal_scaling_and_cropping(tmp_path):
    saved(tmp_path, "a.png", gradient(120, 60))
    sample = read_one(tmp_path)
    scaled = sample.image.resize((60, 30), Image.Resampling.LANCZOS).crop((15, 0, 45, 30))
    ours = (image_tensor(sample, 30) + 1.0) * 127.5
    assert close(ours.permute(1, 2, 0).numpy(), scaled, 1)


def test_early_resolution_gives_the_same_pixels(tmp_path):
    saved(tmp_path, "a.png", gradient(120, 70))
    early = read_one(tmp_path, resolution=32)
    assert early.image.size == (32, 32)
    assert torch.equal(image_tensor(early, 32), image_tensor(read_one(tmp_path), 32))


def test_narrow_images_need_no_more_memory_than_squares(tmp_path):
    saved(tmp_path, "a.png", Image.new("RGB", (16, 60_000)))
    assert image_tensor(read_one(tmp_path), 512).shape == (3, 512, 512)


def test_the_digest_depends_on_image_caption_and_mask_only(masked):
    pictures, masks = masked
    first = read_one(pictures).digest
    assert first == read_one(pictures).digest and len(first) == 64
    assert first == read_one(pictures, resolution=16).digest
    others = {read_one(pictures, caption="the {}").digest, read_one(pictures, masks=masks).digest}
    (pictures / "a.jpg").rename(pictures / "z.jpg")
    assert read_one(pictures).digest == first
    saved(pictures, "z.jpg", gradient(seed=1))
    others.add(read_one(pictures).digest)
    assert len(others | {first}) == 4


def test_images_not_in_memory_are_read_again_and_compared(masked):
    pictures, masks = masked
    in_memory = read_one(pictures, masks=masks)
    free = read_one(pictures, masks=masks, keep_in_memory=False)
    assert free.loaded is None and free.digest == in_memory.digest and free.size == (40, 30)
    assert free.image == in_memory.image and free.mask == in_memory.mask
    assert torch.equal(mask_tensor(free, 4), mask_tensor(in_memory, 4))
    saved(masks, "a.png", Image.new("L", (40, 30), 255))
    assert "changed after the run began" in str(refused(load_image_and_mask, free))


def test_sixteen_bit_images_keep_their_transparent_value(tmp_path):
    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows = np.hstack([np.full((32, 16), 500), np.full((32, 16), 40_000)]).astype(">u2")
    lines = b"".join(b"\0" + line.tobytes() for line in rows)
    content = b"\x89PNG\r\n\x1a\n"
    content += chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 16, 0, 0, 0, 0))
    content += chunk(b"tRNS", struct.pack(">H", 500)) + chunk(b"IDAT", zlib.compress(lines))
    (tmp_path / "a.png").write_bytes(content + chunk(b"IEND", b""))
    image = read_one(tmp_path).image
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((31, 0)) == (156,) * 3

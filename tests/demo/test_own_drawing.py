"""The demo with a user's own pictures: files, output, a second run and bad input."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import customize
from customize.cli import main
from customize.demo import own_drawing
from customize.demo.own_drawing import concept_name, run_own_drawing
from customize.errors import ConfigError, CustomizeError, DataError, SettingsError, StorageError
from customize.storybook import bundled_assets
from tests.recording import record_in_one_step
from tests.stickers.making import draw_shape
from tests.tiny import tiny_sd

#: A tiny model learns 2 steps in a moment.
FEW = {"rank": 4, "steps": 2, "warmup_steps": 0, "checkpoint_every": 0, "num_shared_directions": 0}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base as `assets/stickers`."""
    folder = tmp_path_factory.mktemp("clone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.tiny.CLIP_LENGTH", 77)  # the words of stickers fall into letters
        tiny_sd().save_pretrained(folder / "assets/stickers")
    return folder


@pytest.fixture
def few_steps(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo finds the tiny base, in the current folder too, and learns for two steps."""
    monkeypatch.chdir(clone)
    monkeypatch.setattr(bundled_assets, "ASSETS", clone / "assets")
    monkeypatch.setattr(own_drawing, "TRAINING", own_drawing.TRAINING | FEW)
    record_in_one_step(monkeypatch)


def write_pictures(folder: Path, sizes: tuple[tuple[int, int], ...] = ((90, 60), (64, 64))) -> Path:
    """Pictures of a polygon on white, of these sizes."""
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        image = Image.new("RGB", size, "white")
        shape = draw_shape(2, "marker").resize((40, 40))
        image.paste(shape, (10, 5), shape)
        image.save(folder / f"{number}.png")
    return folder


@pytest.mark.usefixtures("few_steps")
@pytest.mark.filterwarnings("ignore:the text encoder does not know the class word 'animal'")
def test_pictures_without_captions_become_a_concept_and_a_sheet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = write_pictures(tmp_path / "My star!")
    sheet = run_own_drawing(pictures, tmp_path / "out")
    assert sheet == tmp_path / "out/own.png"
    info = customize.load_concept(tmp_path / "out/concepts/my-star").info
    assert info.trigger == "<my-star>" and info.class_word == "animal"
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] == 5 * 204 + 12
    assert pixels.shape[0] > 3 * 204
    # Two pictures and no third one in the first row.
    first_row = pixels[12:204]
    assert (first_row[:, 216:408] < 250).any() and (first_row[:, 420:] == 255).all()

    out = capsys.readouterr().out
    assert "1/2 learning <my-star> from 2 images of the class animal" in out
    assert "2/2 drawing <my-star>" in out and f"Image: {sheet}" in out
    lines = [line for line in out.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 80
    snippet = out.split("To use the concept in Python:\n")[1]
    exec(snippet.replace('").images', '", num_inference_steps=1).images'), {})
    with Image.open("my-star.png") as image:
        assert image.size == (32, 32)


@pytest.mark.usefixtures("few_steps")
def test_a_second_run_trains_nothing_and_other_pictures_are_refused(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "star")
    run_own_drawing(pictures, tmp_path)
    files = sorted((tmp_path / "concepts").rglob("*.safetensors"))
    before = [path.stat().st_mtime_ns for path in files]
    (tmp_path / "own.png").unlink()
    run_own_drawing(pictures, tmp_path)
    assert [path.stat().st_mtime_ns for path in files] == before
    assert (tmp_path / "own.png").is_file()

    (pictures / "0.png").unlink()
    with pytest.raises(SettingsError, match="choose another --name or --output"):
        run_own_drawing(pictures, tmp_path)
    run_own_drawing(pictures, tmp_path, name="other", class_word="dog")
    assert customize.load_concept(tmp_path / "concepts/other").info.class_word == "dog"


@pytest.mark.usefixtures("few_steps")
def test_captions_are_read(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "star")
    (pictures / "0.txt").write_text("a sticker of a large star on the left")
    with pytest.raises(DataError, match=r"without the trigger <star>: 0\.png"):
        run_own_drawing(pictures, tmp_path)
    assert not (tmp_path / "concepts").exists()


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize(
    ("count", "message"),
    [(0, "no images in the folder"), (21, "21 images in the folder, more than the 20")],
)
def test_folders_with_no_or_many_pictures(tmp_path: Path, count: int, message: str) -> None:
    pictures = write_pictures(tmp_path / "star", ((32, 32),) * count)
    with pytest.raises(DataError, match=message) as caught:
        run_own_drawing(pictures, tmp_path / "out")
    assert caught.value.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("few_steps")
def test_bad_pictures_and_names(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "star")
    with pytest.raises(DataError, match=r"cannot be read: No such file .*star"):
        run_own_drawing(tmp_path / "stra", tmp_path)
    with pytest.raises(ConfigError, match="name"):
        run_own_drawing(pictures, tmp_path, name="../star")
    (pictures / "2.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"2\.png"):
        run_own_drawing(pictures, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["star"]


@pytest.mark.usefixtures("few_steps")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "star")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        run_own_drawing(pictures, tmp_path / "file")


def test_a_checkout_without_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled_assets, "ASSETS", tmp_path)
    pictures = write_pictures(tmp_path / "star")
    with pytest.raises(CustomizeError, match=r"base of stickers is missing.*make stickers"):
        run_own_drawing(pictures, tmp_path / "out")


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("star", "star"),
        ("My Star 2", "my-star-2"),
        ("__été__", "t"),
        ("写真", "own"),
        ("a" * 80, "a" * 32),
        ("-", "own"),
    ],
)
def test_names_of_folders(tmp_path: Path, folder: str, name: str) -> None:
    assert concept_name(tmp_path / folder) == name
    assert concept_name(tmp_path / folder / "..") != ""


@pytest.mark.parametrize(("flag", "value"), [("--name", "star"), ("--class-word", "dog")])
def test_flags_that_need_pictures(
    capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    assert main(["demo", flag, value]) == 2
    assert f"{flag} has no effect without --images" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_learns_captioned_pictures_on_a_base_of_true_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bundled_assets.ASSETS / "storybook", tmp_path / "assets/stickers")
    monkeypatch.setattr(bundled_assets, "ASSETS", tmp_path / "assets")
    few = {"steps": 11, "checkpoint_every": 0}
    monkeypatch.setattr(own_drawing, "TRAINING", own_drawing.TRAINING | few)
    monkeypatch.chdir(tmp_path)
    pictures = write_pictures(tmp_path / "photos", ((64, 64), (300, 200), (64, 64)))
    (pictures / "1.txt").write_text("a sticker of <star> on the left on a white background\n")
    flags = ["--name", "star", "--class-word", "cup", "--output", "mine"]
    assert main(["demo", "--images", "photos", *flags]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert out.rstrip().endswith('.images[0].save("star.png")')
    assert customize.load_concept("mine/concepts/star").info.class_word == "cup"
    with Image.open("mine/own.png") as sheet:
        assert sheet.width == 5 * 204 + 12

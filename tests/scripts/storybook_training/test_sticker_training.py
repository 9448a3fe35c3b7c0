"""Training a base on stickers: from scratch, from another base, and by the command."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from customize.errors import DataError
from customize.stickers.judges import load_sticker_judges
from customize.stickers.subjects import CHOICES, training_split
from scripts import train_storybook
from scripts.storybook_training import pretrain_base
from scripts.storybook_training.worlds import STICKER_TEXT_LENGTH, open_world, sticker_world
from tests.stickers.making import SUBJECTS, write_artwork

PRESET = replace(pretrain_base.PRESETS["tiny"], scenes=24, wide=0.5, two=0.5)


@pytest.fixture(scope="module")
def artwork(tmp_path_factory):
    return write_artwork(tmp_path_factory.mktemp("artwork") / "stickers")


@pytest.fixture(scope="module")
def world(artwork):
    whole = sticker_world(artwork)
    # Each checkpoint draws the sample prompts at 25 steps; one will do here.
    return replace(whole, sample_prompts=whole.sample_prompts[:1])


def train(world, folder, steps, start=None):
    folder.mkdir(exist_ok=True)
    preset = replace(PRESET, steps=steps)
    vae = pretrain_base.train_vae(world, folder, preset, "cpu", start)
    return pretrain_base.train_denoiser(world, folder, preset, vae, "cpu", start)


def test_a_base_is_trained_and_starts_another(world, tmp_path):
    first = train(world, tmp_path / "whole", 2).text_encoder.state_dict()
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "whole/base")
    assert pipe.tokenizer.model_max_length == STICKER_TEXT_LENGTH
    assert pipe.tokenizer.tokenize("honeybee") == ["honeybee</w>"]
    assert "Crayons by the tests" in (tmp_path / "whole/base/ATTRIBUTION.md").read_text()
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a marker pear", num_inference_steps=1, height=64, width=96).images[0]
    assert image.size == (96, 64)

    more = train(world, tmp_path / "more", 1, start=tmp_path / "whole/base")
    assert {name: value.shape for name, value in more.text_encoder.state_dict().items()} == {
        name: value.shape for name, value in first.items()
    }
    # One step at the first of 50 learning rates of the warm-up changes little.
    for name, value in more.text_encoder.state_dict().items():
        assert torch.allclose(value, first[name], atol=2e-3), name


def test_scenes_of_the_world_are_drawn_and_captioned(world):
    scene = world.training_scene(0, 3)
    assert scene == world.training_scene(0, 3)
    assert scene != world.training_scene(0, 4)
    image = world.draw(world.training_scene(0, 3, width=128))
    assert image.size == (128, 64)
    assert world.caption(scene, np.random.default_rng(0))


def test_sample_prompts_name_training_subjects(artwork):
    world = sticker_world(artwork)
    tokenizer = world.make_tokenizer()
    assert len(set(world.sample_prompts)) == 10
    for prompt in world.sample_prompts:
        assert len(tokenizer.tokenize(prompt)) == len(prompt.split()), prompt
    text = " ".join(world.sample_prompts)
    assert "snail" not in text and "grapes" not in text and " ink " not in text
    assert sum(subject.name in text for subject in SUBJECTS) >= 7
    assert "an orange background" in text
    for code, hand in training_split(artwork).held_out_pairs:
        name = next(subject.name for subject in SUBJECTS if subject.id == code)
        assert f"{hand} {name}" not in text


def test_latents_of_other_artwork_are_not_taken(artwork, tmp_path):
    other = write_artwork(tmp_path / "other")
    path = other.folder / "metadata.json"
    path.write_text(path.read_text() + " ")
    fingerprints = {sticker_world(a, c).fingerprint for a in (artwork, other) for c in CHOICES}
    assert len(fingerprints) == 4


def test_worlds_are_opened_by_name(artwork, tmp_path):
    assert open_world("storybook").name == "storybook"
    assert open_world("stickers", artwork.folder, "all").name == "stickers"
    with pytest.raises(DataError, match="make stickers"):
        open_world("stickers", tmp_path)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_storybook.py", *map(str, arguments)])
    train_storybook.main()


@pytest.mark.parametrize("world", ["stickers", "storybook"])
def test_the_command_draws_a_sheet(artwork, tmp_path, monkeypatch, world):
    path = tmp_path / "sheet.png"
    run(monkeypatch, "--world", world, "--artwork", artwork.folder, "--sheet", path)
    sheet = Image.open(path)
    assert sheet.width == 5 * (128 * 3 + 8)
    assert sheet.height >= 8 * 64 * 3
    assert np.asarray(sheet).std() > 10
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]


def test_the_command_reports_missing_artwork(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--world", "stickers", "--artwork", tmp_path)
    assert "make stickers" in capsys.readouterr().err


def test_the_command_trains_judges_with_the_autoencoder_of_a_base(artwork, tmp_path, monkeypatch):
    run(
        monkeypatch,
        *("--world", "stickers", "--artwork", artwork.folder, "--stage", "judges"),
        *("--preset", "tiny", "--folder", tmp_path, "--device", "cpu"),
        *("--start", "assets/storybook", "--vae-steps", 0),
    )
    judges = load_sticker_judges(tmp_path / "judges")
    assert judges.prototypes.hands == ("crayon", "marker")
    assert not (tmp_path / "base").exists()

"""The whole demo with few training steps: its files, and a second run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from PIL import Image

import customize
from customize.demo import experiment
from customize.demo.run_demo import run_demo
from customize.errors import SettingsError
from customize.storybook.bundled_assets import assets_folder
from tests.references.storybook_model import storybook_references

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    references = storybook_references(tmp_path_factory.mktemp("model") / "references")
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        patch.setattr("customize.demo.run_demo.references_folder", lambda: references)
        assert run_demo(folder) == folder
    return folder


def shorten(patch: pytest.MonkeyPatch, **changes: object) -> None:
    patch.setattr(experiment, "SEEDS", (1,))
    patch.setattr(
        experiment, "TRAINING", experiment.TRAINING | {"steps": 11, "checkpoint_every": 0} | changes
    )


def test_files_of_the_demo(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        *("concepts", "ordinary", "grid.png", "crosstalk.png", "rewriting.png"),
        *("scorecard.md", "scorecard.json"),
    }
    card = json.loads((folder / "scorecard.json").read_text())
    assert card["command"] == "make demo"
    assert {row["model"] for row in card["rows"]} >= {
        experiment.ORTHOGONAL_ALONE,
        experiment.ORTHOGONAL_MERGED,
        experiment.LORA_MERGED,
        experiment.REFERENCES,
    }
    assert "| five references, no training | rex |" in (folder / "scorecard.md").read_text()
    for name in ("grid.png", "crosstalk.png", "rewriting.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300


def test_files_do_not_contain_the_path_of_the_clone(folder: Path) -> None:
    place = str(assets_folder().parent)
    for path in (*folder.rglob("*.json"), *folder.rglob("*.md"), *folder.rglob("*.safetensors")):
        assert place.encode() not in path.read_bytes(), path


def test_the_printed_snippet_works(folder: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(assets_folder() / "storybook")
    customize.load_custom(pipe, *(folder / "concepts" / name for name in experiment.NAMES))
    assert [row.slices for row in pipe.custom.rows] == ["disjoint"] * 3
    assert pipe.custom.merge == "fusion"


def test_a_second_run_trains_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)
    files = sorted(folder.rglob("*.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in files}
    run_demo(folder)
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_other_settings_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, rank=4)
    with pytest.raises(SettingsError, match=r"rank was 8 and is 4.*delete that folder"):
        run_demo(folder)

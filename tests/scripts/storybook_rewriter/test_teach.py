"""All stages of scripts/teach_storybook_rewriter.py on the bundled model, with two prompts."""

from __future__ import annotations

import json
import sys

import pytest

import customize
from customize.storybook.bundled_assets import rewriter_folder
from tests.evaluation.making import save_clip

pytest.importorskip("trl")

import teach_storybook_rewriter


@pytest.mark.slow
def test_all_stages_train_and_a_second_run_finds_them_done(tmp_path, monkeypatch, capfd):
    folder, reward = tmp_path / "teach", save_clip(tmp_path / "clip")
    flags = [
        "--folder",
        folder,
        "--student",
        rewriter_folder(),
        "--reward",
        reward,
        "--merge",
        "dpo-1",
    ]
    flags += ["--prompts", 3, "--children", 3, "--margin", 0, "--pairs", 2, "--batch", 1]
    monkeypatch.setattr(sys, "argv", ["teach", *map(str, flags)])
    teach_storybook_rewriter.main()
    for stage in ("sft", "dpo-1", "dpo-2", "dpo-alone"):
        settings = json.loads((folder / stage / "training.json").read_text())["settings"]
        assert settings["method"] == stage.partition("-")[0]
    drawn = len(list((folder / "pictures").glob("*.png")))
    assert drawn > 3
    taught = customize.Rewriter.from_pretrained(folder / "merged")
    lora = customize.Rewriter.from_pretrained(folder / "dpo-1")
    prompt = "crimson kitty wih spectacles at the seaside"
    assert taught.rewrite(prompt)[0].text == lora.rewrite(prompt)[0].text
    capfd.readouterr()
    teach_storybook_rewriter.main()
    assert "customize rewriter" not in capfd.readouterr().out
    assert len(list((folder / "pictures").glob("*.png"))) == drawn

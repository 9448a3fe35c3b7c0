"""``customize references train``: flags and files as settings."""

from __future__ import annotations

from pathlib import Path

import yaml

from customize.cli.references_command import GROUPS
from customize.references.model import ReferenceModel
from customize.training.references.config import ReferenceTrainConfig
from tests.cli.making import Run, World
from tests.training.references.tiny_references import SMALL, make_groups, make_mllm


def test_every_setting_has_a_flag_with_its_help(run: Run) -> None:
    out = run("references", "train", "--help").out
    assert "…" not in out and max(map(len, out.splitlines())) <= 80
    text = " ".join(out.split())
    for name in ReferenceTrainConfig.model_fields:
        assert f"--{name.replace('_', '-')} " in text
    assert set(GROUPS) <= set(ReferenceTrainConfig.model_fields)
    for title in GROUPS.values():
        assert f" {title}: --" in text
    assert "alignment|single|multi" in text


def test_training_from_a_file_and_flags(run: Run, world: World, tmp_path: Path) -> None:
    settings = {
        **SMALL,
        "base": str(world.base),
        "images": str(make_groups(tmp_path / "images")),
        "mllm": str(make_mllm(tmp_path / "mllm")),
        "output": str(tmp_path / "refs"),
        "device": "cpu",
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    result = run("references", "train", "--config", str(file), "--steps", "1")
    assert result.code == 0, result.err
    assert "stage        alignment, the references of a target are itself" in result.out
    assert "1 step of 2 targets" in result.out
    assert f"starts from  the MLLM in {settings['mllm']}\n" in result.out
    assert "None" not in result.out
    assert f"The references are in {tmp_path / 'refs'}: 4 tokens for models of family sd" in (
        result.out
    )
    assert ReferenceModel.from_pretrained(tmp_path / "refs").config.num_tokens == 4


def test_invalid_settings_are_reported(run: Run, world: World, tmp_path: Path) -> None:
    flags = ["--base", str(world.base), "--output", str(tmp_path / "refs")]
    result = run("references", "train", *flags, "--stage", "multy")
    assert result.code == 2 and "did you mean multi" in result.err
    result = run("references", "train", *flags, "--stage", "multi")
    assert result.code == 2 and "there are no training images" in result.err
    assert result.out == ""
    images = make_groups(tmp_path / "images", (1,))
    flags += ["--images", str(images)]
    result = run("references", "train", *flags, "--stage", "multi")
    assert result.code == 2 and "neither an MLLM nor references" in result.err
    assert result.out == ""
    flags += ["--mllm", str(make_mllm(tmp_path / "mllm"))]
    result = run("references", "train", *flags, "--stage", "multi")
    assert result.code == 2 and "every group has one image" in result.err
    assert not (tmp_path / "refs").exists()

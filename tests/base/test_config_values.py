"""Invalid configuration values are refused by name when the base is loaded."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from customize.base.config_values import check_config_values
from customize.base.load_pipeline import load_pipeline
from customize.errors import PipelineError
from tests.tiny import tiny_sd
from tests.tiny_families import TINY_FAMILIES


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "sd"
    tiny_sd().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("vae/config.json", "scaling_factor", math.nan),
        ("vae/config.json", "scaling_factor", 0),
        ("vae/config.json", "scaling_factor", "x"),
        ("vae/config.json", "scaling_factor", None),
        ("scheduler/scheduler_config.json", "beta_end", math.nan),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 0),
        ("scheduler/scheduler_config.json", "prediction_type", "zzz"),
        ("unet/config.json", "sample_size", 0),
        ("tokenizer/tokenizer_config.json", "model_max_length", None),  # leaves 1e30
        ("tokenizer/tokenizer_config.json", "model_max_length", 512),
        ("tokenizer/tokenizer_config.json", "model_max_length", 0),
        ("tokenizer/tokenizer_config.json", "model_max_length", -5),
        ("tokenizer/tokenizer_config.json", "model_max_length", "a"),
    ],
)
def test_an_invalid_value_is_named(
    file: str, name: str, value: object, saved: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(saved, tmp_path / "base"))
    values = json.loads((base / file).read_text()) | {name: value}
    (base / file).write_text(json.dumps(values))
    with pytest.raises(PipelineError) as raised:
        load_pipeline(str(base), torch.float32)
    assert name in raised.value.problem and file.split("/")[0] in raised.value.problem


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_every_family_has_valid_values(name: str) -> None:
    check_config_values(TINY_FAMILIES[name](), "base")

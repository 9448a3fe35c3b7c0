"""Rewards by name, and the guide's table of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import customize
from customize.errors import ConfigError, PipelineError
from customize.evaluation.rewards import REWARDS, load_reward
from tests.evaluation.making import save_clip, save_dino

GUIDE = Path(customize.__file__).parent / "evaluation" / "README.md"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clop", "unknown reward 'clop'.*did you mean clip.*choose from clip, blip_itm"),
        ("", "unknown reward ''"),
        (None, "unknown reward None"),
        ("clip:large", "the reward clip has no variants.*give 'clip'"),
        ("pyiqa", "pyiqa lacks the name of its variant.*give 'pyiqa:NAME'"),
        ("video_score:", "video_score lacks the name of its variant"),
    ],
)
def test_unknown_names_are_refused(name: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_reward(name)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", None, 1.5])
def test_unknown_devices_are_refused(device: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is unknown or missing.*device"):
        load_reward("clip", save_clip(tmp_path), device)


def test_other_models_are_refused(tmp_path: Path) -> None:
    dino = save_dino(tmp_path)
    for name in ("clip", "pick_score", "aesthetic", "blip_itm", "blip2_itm", "yes_no"):
        with pytest.raises(PipelineError, match="of type dinov2, not a"):
            load_reward(name, dino)


def test_the_guide_lists_all_rewards() -> None:
    rows = {}
    for line in GUIDE.read_text().splitlines():
        if match := re.match(r"\| `([a-z0-9_]+)(:NAME)?`[^|]*\|([^|]*)\|([^|]*)\|([^|]*)\|$", line):
            rows[match[1]] = [cell.strip() for cell in match.groups()[1:] if cell is not None]
    assert list(rows) == list(REWARDS)
    for name, kind in REWARDS.items():
        cells = rows[name][-3:]
        assert cells[0] == kind.measures
        assert kind.model is None or f"`{kind.model}`" in cells[1]
        assert (f"`{kind.needs}`" in cells[2]) == bool(kind.needs)


def test_loading_the_registry_imports_no_optional_package() -> None:
    code = (
        "import sys, customize.evaluation.rewards\n"
        "print([m for m in ('transformers', 'pyiqa', 'hpsv3', 'ImageReward', 'mantis')"
        " if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"

"""``customize rewriter train --method grpo``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from customize.storybook.bundled_assets import rewriter_folder
from tests.cli.making import Run, World, refused
from tests.evaluation.making import save_clip

pytest.importorskip("trl")


def test_online_training_takes_prompts_base_and_rewards(
    run: Run, world: World, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "puppy at the seaside"}\n{"prompt": "2 red cats"}\n')
    clip = save_clip(tmp_path / "clip")
    output = tmp_path / "out"
    given = (
        *("rewriter", "train", "--method", "grpo", "--model", rewriter_folder()),
        *("--data", prompts, "--output", output, "--base", world.base),
        *("--batch-size", 2, "--num-generations", 2, "--epochs", 1, "--pictures", 1),
        *("--sampling-steps", 2, "--max-new-tokens", 16, "--device", "cpu"),
    )
    refused(run(*given), "reward is missing")
    rewards = ("--reward", "clip=10", "--reward-model", f"clip={clip}")
    refused(
        run(*given, *rewards, "--floor", "aesthetic=1"),
        "the floor aesthetic=1.0 belongs to no reward",
    )
    assert not output.exists()
    result = run(*given, *rewards)
    assert result.code == 0, result.err
    assert f"The LoRA is in {output}" in result.out
    log = json.loads((output / "training.json").read_text())["log"]
    assert [row["step"] for row in log if "reward" in row] == [1]
    # The flags of other methods' data do not fit.
    data = ("--method", "sft", "--data", prompts)
    refused(run(*given, *rewards, *data), "method sft does not use it")

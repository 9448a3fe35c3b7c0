"""Online training with the bundled miniature, base and a CLIP: what is rewarded, drawn, resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from customize.errors import ConfigError, CustomizeError
from customize.stages.rewrite import Rewriter
from customize.storybook.bundled_assets import assets_folder, rewriter_folder
from customize.training.rewriting.config import RewriterTrainConfig
from tests.evaluation.making import save_clip

pytest.importorskip("trl")

from customize.training.rewriting.recipe import train_rewriter

WEIGHTS = "adapter_model.safetensors"
PROMPTS = ["puppy at the seaside", "2 red cats"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_clip(tmp_path_factory.mktemp("clip")))


def config(clip: str, output: Path, **changes) -> RewriterTrainConfig:
    data = output.parent / "prompts.txt"
    data.write_text("\n".join(PROMPTS))
    settings = {
        "model": str(rewriter_folder()),
        "data": data,
        "output": output,
        "method": "grpo",
        "base": str(assets_folder() / "storybook"),
        "reward": {"clip": 10.0},
        "reward_model": {"clip": clip},
        "pictures": 1,
        "sampling_steps": 2,
        "num_generations": 4,
        "batch_size": 2,
        "epochs": 3,
        "learning_rate": 1e-3,
        "warmup": 0.0,
        "max_new_tokens": 24,
        "checkpoint_every": 1,
        "keep_checkpoints": 3,
        "device": "cpu",
    }
    return RewriterTrainConfig(**settings | changes)


@pytest.fixture(scope="module")
def trained(clip, tmp_path_factory):
    return train_rewriter(config(clip, tmp_path_factory.mktemp("grpo") / "out"))


def read_log(folder: Path) -> list[dict]:
    return json.loads((folder / "training.json").read_text())["log"]


def test_rewritings_are_drawn_and_rewarded(trained):
    steps = [row for row in read_log(trained) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        assert row["reward"] == row["rewards/pictures/mean"]
        assert 0 < row["faithful"] <= 1
        assert row["completions/max_length"] <= 24
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6) and steps[-1]["kl"] > 0
    assert any(row["grad_norm"] > 0 for row in steps)
    # The users' own prompts, and at least one rewriting of each.
    assert len(list((trained / "pictures").iterdir())) >= 4
    settings = json.loads((trained / "training.json").read_text())["settings"]
    assert settings["beta"] == 0.04 and settings["reward"] == {"clip": 10.0}
    weights = load_file(trained / WEIGHTS)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


def test_what_was_trained_rewrites(trained):
    rewriter = Rewriter.from_pretrained(trained)
    assert rewriter.sampling.max_new_tokens == 24
    assert rewriter.rewrite(PROMPTS)[0].text


def test_a_training_that_was_cut_off_resumes_to_the_same_weights(clip, trained, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(trained, cut)
    for number in (2, 3):
        shutil.rmtree(cut / f"checkpoint-{number}")
    (cut / WEIGHTS).unlink()
    same = {"data": trained.parent / "prompts.txt"}
    train_rewriter(config(clip, cut, **same))
    first, second = load_file(trained / WEIGHTS), load_file(cut / WEIGHTS)
    assert all(torch.equal(first[key], second[key]) for key in first)
    rows = zip(read_log(trained), read_log(cut), strict=True)
    assert all(a["reward"] == b["reward"] for a, b in rows if "reward" in a)
    with pytest.raises(CustomizeError, match="other settings: penalty"):
        train_rewriter(config(clip, cut, **same, penalty=3))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ray_gives_the_same_rewards(clip, trained, tmp_path):
    pytest.importorskip("ray")
    folder = train_rewriter(config(clip, tmp_path / "out", ray="local", workers=1))
    rows = [row for row in read_log(trained) if "reward" in row]
    found = [row for row in read_log(folder) if "reward" in row]
    assert [row["step"] for row in found] == [1, 2, 3]
    for row, other in zip(rows, found, strict=True):
        assert other["reward"] == pytest.approx(row["reward"], rel=1e-2, abs=1e-2)
    names = {path.name for path in (trained / "pictures").iterdir()}
    assert {path.name for path in (folder / "pictures").iterdir()} == names
    # Where pictures are drawn may change between a training and its resumption.
    shutil.rmtree(folder / "checkpoint-3")
    train_rewriter(config(clip, tmp_path / "out"))


def test_ray_is_refused_with_several_training_processes(clip, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="ray draws for one training process"):
        train_rewriter(config(clip, tmp_path / "out", ray="local"))
    assert not (tmp_path / "out").exists()


def test_training_goes_on_from_a_lora(clip, trained, tmp_path):
    again = train_rewriter(config(clip, tmp_path / "out", model=str(trained), epochs=1))
    steps = [row for row in read_log(again) if "loss" in row]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)  # the reference is the LoRA's own copy
    assert not (again / "ref").exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"batch_size": 7}, "all passes over the data have 6 prompts, and one step takes 7"),
        ({"max_length": 40}, r"line 1 has \d+ tokens"),
        ({"base": str(rewriter_folder())}, "cannot be loaded"),
        ({"reward": {"clap": 1.0}, "reward_model": {}}, "unknown reward 'clap'"),
        ({"reward_model": {"blip_itm": "x"}}, "belongs to no reward"),
        ({"reward": {"clop": 1.0}}, r"unknown reward 'clop' .*did you mean clip"),
        ({"floor": {"blip_itm": 0.1}}, "the floor blip_itm=0.1 belongs to no reward"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    clip, tmp_path, changes, problem
):
    with pytest.raises(CustomizeError, match=problem):
        train_rewriter(config(clip, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"base": None}, "base is missing"),
        ({"reward": {}}, "reward is missing"),
        ({"reward": "clip"}, "should be names with weights, such as clip=1"),
        ({"reward_model": "clip"}, "should be names with values"),
        ({"base": "model.ckpt"}, "pickle"),
        ({"num_generations": 1}, "num_generations is 1"),
        ({"workers": 2}, "workers was given without ray"),
        ({"reward": ["clip=1", "clip=2"]}, "gives clip more than one weight"),
        ({"method": "dpo"}, "method dpo does not use it"),
        ({"method": "sft"}, "base is .*: method sft does not use it"),
    ],
)
def test_bad_settings_are_refused(clip, tmp_path, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        config(clip, tmp_path / "out", **changes)


def test_settings_of_a_shell(clip, tmp_path):
    typed = {"reward": ["clip=10", "aesthetic=.5"], "reward_model": ["clip=a,b=c"]}
    loaded = config(clip, tmp_path / "out", **typed)
    assert loaded.reward == {"clip": 10.0, "aesthetic": 0.5}
    assert loaded.reward_model == {"clip": "a,b=c"}
    assert loaded.rate == 1e-3 and config(clip, tmp_path / "o", learning_rate=None).rate == 1e-5

"""No judge is a reward of the same study, whatever file it comes from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from customize.errors import ConfigError
from customize.evaluation.rewards import WeightedSum, check_judges, load_reward
from customize.evaluation.rewards.yes_no import YesNoReward
from tests.evaluation.making import save_clip
from tests.evaluation.rewards.making import ColourReward, save_aesthetic, save_llava


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def copy_model(model: Path, folder: Path, dtype: torch.dtype, shift: float = 0) -> Path:
    """A model's folder with weights in another dtype, one of them changed."""
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = {
        key: tensor.to(dtype) for key, tensor in load_file(model / "model.safetensors").items()
    }
    weights["visual_projection.weight"][0, 0] += shift
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = (folder / "config.json").read_text()
    name = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(config.replace('"float32"', f'"{name}"'))
    return folder


def test_the_same_weights_are_found_in_any_file(clip: Path, tmp_path: Path) -> None:
    reward = load_reward("clip", clip)
    with pytest.raises(ConfigError, match=r"judge has the weights of the reward clip \(clip\)"):
        check_judges([reward], [reward])
    half = load_reward("clip", copy_model(clip, tmp_path, torch.float16))
    with pytest.raises(ConfigError, match="weights of the reward clip"):
        check_judges([reward], [half])


def test_other_weights_and_other_kinds_may_judge(clip: Path, tmp_path: Path) -> None:
    reward = load_reward("clip", clip)
    (tmp_path / "other").mkdir()
    other = load_reward("clip", copy_model(clip, tmp_path / "other", torch.float32, shift=0.5))
    aesthetic = load_reward("aesthetic", save_aesthetic(tmp_path / "aesthetic"))
    check_judges([reward], [other, load_reward("pick_score", clip), aesthetic])
    check_judges([], [reward])
    check_judges([reward], [])


def test_judges_and_rewards_are_found_in_sums(clip: Path) -> None:
    reward, red = load_reward("clip", clip), ColourReward(0, "red")
    inner = WeightedSum({"clip": 1.0, "red": 1.0}, rewards={"clip": reward, "red": red})
    outer = WeightedSum({"all": 2.0}, rewards={"all": inner})
    judge = load_reward("clip", clip)
    for rewards, judges in (([outer], [judge]), ([red, judge], [outer]), ([outer], [inner])):
        with pytest.raises(ConfigError, match="weights of the reward"):
            check_judges(rewards, judges)
    check_judges([outer], [ColourReward(1, "green")])


def test_another_question_to_the_same_model_is_the_same_judge(tmp_path: Path) -> None:
    llava = save_llava(tmp_path)
    question = "Is this picture sharp?"
    message = re.escape(f"weights of the reward yes_no (yes_no:{question})")
    with pytest.raises(ConfigError, match=message):
        check_judges([load_reward("yes_no", llava)], [YesNoReward(llava, question=question)])


def test_a_digest_is_of_the_weights_alone(clip: Path, tmp_path: Path) -> None:
    digest = load_reward("clip", clip).digest
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert load_reward("clip", copy_model(clip, tmp_path, torch.float32)).digest == digest

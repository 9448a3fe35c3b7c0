"""Settings of a training of references."""

from __future__ import annotations

import pytest

from customize.errors import ConfigError
from customize.training.references.config import ReferenceTrainConfig, load_reference_config

NEEDED = {"base": "base", "output": "out", "stage": "single"}


def test_learning_rate_is_the_stages(tmp_path):
    assert ReferenceTrainConfig(**NEEDED).peak_learning_rate == 4e-5
    assert ReferenceTrainConfig(**NEEDED, learning_rate=1e-3).peak_learning_rate == 1e-3
    file = tmp_path / "config.yaml"
    file.write_text("base: base\noutput: out\nstage: multi\nvalidation_prompts: a dog\n")
    config = load_reference_config(file, steps="7")
    assert (config.peak_learning_rate, config.steps) == (2e-5, 7)
    assert config.validation_prompts == ("a dog",)
    assert ReferenceTrainConfig(**config.model_dump(mode="json", exclude_unset=True)) == config


def test_encoder_settings_make_the_configuration():
    config = ReferenceTrainConfig(**NEEDED, num_tokens=16, lora_rank=8, max_references=4)
    made = config.references_config("sd", 32)
    assert (made.num_tokens, made.lora_rank, made.lora_alpha, made.max_references) == (16, 8, 8, 4)
    assert made.family == "sd" and made.width == 32


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"stage": "multiple"}, "did you mean multi"),
        ({"staage": "multi"}, "did you mean stage"),
        ({"init": "a", "mllm": "b"}, "starts from references. Fix: leave mllm out"),
        ({"init": "a", "num_tokens": 3}, "decides num_tokens. Fix: leave it out"),
        ({"init": "a", "num_tokens": 3, "lora_rank": 2}, "lora_rank, num_tokens. Fix: leave them"),
        ({"init": "out"}, "is the output folder"),
        ({"images": "out/images"}, "contains the training images"),
        ({"drop_images": 0.5, "drop_text": 0.4, "drop_both": 0.2}, "is above 1 together"),
        ({"warmup_steps": 10, "steps": 10}, "must be below the number of steps, 10"),
        ({"max_references": 0}, "greater than or equal to 1"),
        ({"base": "x.ckpt"}, "is a pickle"),
        ({"learning_rate": float("nan")}, "finite"),
    ],
)
def test_invalid_settings(changes, problem):
    with pytest.raises(ConfigError) as error:
        ReferenceTrainConfig(**{**NEEDED, **changes})
    assert problem in str(error.value)


def test_missing_settings_are_named():
    with pytest.raises(ConfigError) as error:
        ReferenceTrainConfig()
    assert all(f"{name} is missing" in str(error.value) for name in NEEDED)

"""Flags and files as settings, and training runs of a tiny base."""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from customize.cli import config_flags
from customize.cli.config_flags import GROUPS
from customize.cli.train_command import describe_run
from customize.concepts.io.read_concept import load_concept
from customize.training.config import TrainConfig, load_config
from tests.cli.making import Run, World, photos, refused
from tests.forked import COMMAND, Forked

ROOT = Path(__file__).parents[2]
#: Steps of a run that is stopped; so many that the signal arrives before the end.
STEPS = 30


def arguments(world: World, folder: Path, **settings: object) -> list[str]:
    values = {
        "base": world.base,
        "images": folder / "photos",
        "output": folder / "max",
        "name": "max",
        "class_word": "dog",
        "rank": 2,
        "steps": 2,
        "batch_size": 1,
        "device": "cpu",
        # Images for these would take longer than the run itself.
        "num_shared_directions": 0,
    } | settings
    flags = [
        part for key, value in values.items() for part in ("--" + key.replace("_", "-"), str(value))
    ]
    return [*flags, "--no-record-inputs", "--no-samples"]


def test_every_setting_has_a_flag_with_its_help(run: Run) -> None:
    out = run("train", "--help").out
    assert "…" not in out and max(map(len, out.splitlines())) <= 80
    text = " ".join(out.split())
    for name, field in TrainConfig.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        assert field.description is not None
        assert " ".join(field.description.split()[:3]) in text
    assert set(GROUPS) <= set(TrainConfig.model_fields)
    for title in GROUPS.values():
        assert f" {title}: --" in text
    assert "orthogonal|lora" in text and "[default: 1e-05]" in text


def test_training_prints_a_plan_and_working_lines(run: Run, world: World, tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    result = run("train", *arguments(world, tmp_path), "--no-train-text-encoder")
    assert result.code == 0, result.err
    assert "max (class dog, trigger <max>)" in result.out
    assert f"The concept max is in {tmp_path / 'max'}" in result.out
    snippet = result.out[result.out.index("    import customize") :]
    code = "\n".join(line.removeprefix("    ") for line in snippet.splitlines())
    names: dict[str, object] = {}
    # The printed lines, with fewer steps.
    exec(code.replace('<max>")', '<max>", num_inference_steps=1)'), names)
    assert "max" in repr(names["pipe"].custom)  # type: ignore[attr-defined]
    concept = load_concept(tmp_path / "max")
    assert set(concept.updates) == {"unet"} and concept.info.rank == 2


def test_flags_override_the_file(run: Run, world: World, tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    file = tmp_path / "max.yaml"
    settings = {
        "base": world.base,
        "images": str(tmp_path / "photos"),
        "output": str(tmp_path / "max"),
        "name": "max",
        "class_word": "dog",
        "rank": 4,
        "steps": 1,
        "alpha": 3,
        "validation_prompts": ["a photo of <max>"],
        "train_tokens": True,
        "device": "cpu",
        # Images for these would take longer than the run itself.
        "num_shared_directions": 0,
        "record_inputs": False,
    }
    file.write_text(yaml.safe_dump(settings))
    flags = ("--rank", "2", "--alpha", "none", "--no-train-tokens", "--validation-steps", "1")
    prompts = ("--validation-prompts", "<max>, a dog", "--validation-prompts", "<max> on a beach")
    result = run("train", "--config", file, *flags, *prompts)
    assert result.code == 0, result.err
    info = load_concept(tmp_path / "max").info
    assert (info.rank, info.alpha, info.num_tokens) == (2, 2.0, 0)
    refused(run("train", "--config", tmp_path / "none.yaml"), "cannot be read", "none.yaml")
    file.write_text("rnk: 3")
    words = ("'rnk' is not a setting", "rnk: did you mean rank?", str(file))
    refused(run("train", "--config", file), *words)


def test_concepts_in_one_run(run: Run, world: World, tmp_path: Path) -> None:
    for name in ("max", "kit"):
        photos(tmp_path / name / "photos")
    kit_settings = {"images": tmp_path / "kit" / "photos", "output": tmp_path / "out" / "kit"}
    file = tmp_path / "kit.yaml"
    file.write_text(yaml.safe_dump({k: str(v) for k, v in kit_settings.items()} | {"name": "kit"}))
    flags = arguments(world, tmp_path / "max", output=tmp_path / "out" / "max", steps=3)
    refused(run("train", *flags, "--together", file), "class_word is missing", "kit.yaml")
    with file.open("a") as opened:
        opened.write("class_word: cat\nrank: 4\n")
    refused(
        run("train", "--config", file, "--together", file, *flags[:2]),
        *(
            "name is 'kit' for two",
            "trigger is '<kit>' for two",
            "neither folder may be inside the other",
        ),
    )
    # A flag applies to all concepts; the rank in the file differs.
    result = run("train", *flags, "--together", file)
    assert result.code == 0, result.err
    assert "max (class dog, trigger <max>)" in result.out
    assert "kit (class cat, trigger <kit>)" in result.out
    assert result.out.count("steps   ") == 1 and result.out.count("output  ") == 2
    assert "the concept kit is in" in result.out and "Load them with" in result.out
    snippet = result.out[result.out.index("    import customize") :]
    code = "\n".join(line.removeprefix("    ") for line in snippet.splitlines())
    assert "merge" not in code and "<max> and <kit>" in code
    names: dict[str, object] = {}
    exec(code.replace('<kit>")', '<kit>", num_inference_steps=1)'), names)
    attached = repr(names["pipe"].custom)  # type: ignore[attr-defined]
    assert "max" in attached and "kit" in attached
    concepts = [load_concept(tmp_path / "out" / name).info for name in ("max", "kit")]
    assert [c.rank for c in concepts] == [2, 2]
    assert [c.trained_with for c in concepts] == [["kit"], ["max"]]
    shown = run("inspect", tmp_path / "out" / "kit").out
    assert "trained with" in shown and "max" in shown


def test_settings_are_checked_before_anything_is_read(
    run: Run, world: World, tmp_path: Path
) -> None:
    refused(run("train"), "5 settings are wrong", "base is missing", "class_word is missing")
    result = run("train", *arguments(world, tmp_path, rank="many", steps=0, name="../x"))
    refused(result, "3 settings are wrong", "rank is 'many'", "steps is '0'", "../x")
    refused(run("train", *arguments(world, tmp_path, base="model.ckpt")), "is a pickle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("values", [["class_text=1,output=.5"], ["class_text=1", "output=.5"]])
def test_preserve_accepts_one_or_several_flags(values: list[str]) -> None:
    """Values of the command's flag reach the configuration."""
    seen: dict[str, Any] = {}
    command = config_flags.add_config_flags(
        lambda config, together, settings: seen.update(settings)
    )
    command(**{**dict.fromkeys(TrainConfig.model_fields), "preserve": values})
    facts = {"base": "b", "images": "i", "output": "o", "name": "max", "class_word": "dog"}
    assert load_config(**facts, **seen).preserve == {"class_text": 1.0, "output": 0.5}


def test_invalid_preservations_are_refused_before_reading(
    run: Run, world: World, tmp_path: Path
) -> None:
    for value, messages in (
        ("outptu=1", "unknown losses: 'outptu'. Fix: choose from class_text, context_text, output"),
        ("output=-1", "has a negative weight for output"),
        ("output", "names with weights, such as class_text=1,output=0.5"),
        ("output=many", "valid number"),
    ):
        refused(run("train", *arguments(world, tmp_path, preserve=value)), messages, "preserve")
    assert list(tmp_path.iterdir()) == []


def test_errors_are_one_line_after_the_plan(run: Run, world: World, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    result = run("train", *arguments(world, tmp_path))
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "there are no images in the folder" in result.err
    assert not (tmp_path / "max").exists()


def test_the_plan(tmp_path: Path) -> None:
    facts = {"base": "b", "images": "i", "output": "o", "name": "max", "class_word": "dog"}
    shown = describe_run(TrainConfig(**facts, gradient_accumulation=3))
    assert shown["steps"] == "800 steps of 6 images"
    assert shown["method"] == "orthogonal, rank 8, slice from a hash of the name"
    assert "prior" not in shown
    assert shown["preserves"] == "context_output (weight 0.5)"
    assert "preserves" not in describe_run(TrainConfig(**facts, preserve={}))
    lines = describe_run(TrainConfig(**facts, preserve={"output": 0.5, "class_text": 1}))
    assert lines["preserves"] == "class_text (weight 1), output (weight 0.5)"
    shown = describe_run(TrainConfig(**facts, library="lib", prior_weight=0.5))
    assert shown["method"] == "orthogonal, rank 8, slice disjoint from those in lib"
    assert shown["prior"] == "class images (weight 0.5): 100 generated by the base"
    assert describe_run(TrainConfig(**facts, method="lora"))["method"] == "LoRA, rank 8"


def test_long_captions_are_reported_once(
    run: Run, world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos(tmp_path / "photos")
    libraries = logging.getLogger("transformers")
    libraries.addHandler(caplog.handler)
    try:
        result = run("train", *arguments(world, tmp_path, caption="a dog " * 60 + "{}"))
    finally:
        libraries.removeHandler(caplog.handler)
    assert result.code == 2 and "the trigger is cut off" in result.err.splitlines()[-1]
    assert "longer than the specified maximum" not in caplog.text + result.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_stopping_and_resuming(run: Run, world: World, tmp_path: Path, number: int) -> None:
    photos(tmp_path / "photos")
    command = arguments(world, tmp_path, steps=STEPS, checkpoint_every=2)
    process = Forked(COMMAND, "train", *command)
    end = time.monotonic() + 240
    while not list((tmp_path / "max").glob(".checkpoints/step-*")):
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, number)
    done = process.wait()
    err = done.stderr
    if number == signal.SIGINT:
        assert done.returncode == 130, err
        last = err.splitlines()[-1]
        assert "training was stopped after step" in last and "run the same again" in last
    else:
        assert done.returncode == -signal.SIGKILL, err
    assert not (tmp_path / "max" / "concept.json").exists()
    step = max(int(path.stem[5:]) for path in (tmp_path / "max").glob(".checkpoints/step-*"))
    result = run("train", *command)
    assert result.code == 0, result.err
    # The start of the bar.
    assert f" {step}/{STEPS} [" in result.err and f" 0/{STEPS} [" not in result.err
    assert load_concept(tmp_path / "max").info.name == "max"


def test_a_loss_that_is_not_a_number(run: Run, world: World, tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.bias"].fill_(math.nan)
    save_file(weights, file, {"format": "pt"})
    result = run("train", *arguments(world, tmp_path, base=base))
    assert result.code == 2
    last = result.err.splitlines()[-1]
    assert last.startswith("error: the loss is nan at step 1")
    assert "unet.conv_out.bias" in last and "learning rate" not in last
    assert not (tmp_path / "max").exists()


def test_classes_unknown_to_the_bundled_base_and_the_verdict(run: Run, tmp_path: Path) -> None:
    """The bundled base warns of unknown classes, and its judges end the run with a verdict."""
    flags = ["train", "--base", ROOT / "assets" / "storybook", "--name", "rex", "--steps", 2]
    flags += ["--images", ROOT / "assets" / "concepts" / "rex", "--num-shared-directions", 0]
    flags += ["--preserve", "none", "--no-record-inputs", "--device", "cpu", "--rank", 2]
    result = run(*flags, "--class-word", "zebra", "--output", tmp_path / "zebra")
    assert result.code == 0, result.err
    assert "captions       5 from files, 0 from the template" in result.out
    (last,) = (line for line in result.out.splitlines() if line.startswith("rex: "))
    assert "hardly anything learned: the loss on fixed noise went from " in last
    assert "the last sample does not show rex (distance " in last
    assert "a class word among dog, cat, " in last
    with Image.open(tmp_path / "zebra" / "sample-1.png") as strip:
        assert strip.size == (4 * 64, 64)  # of the base, and after 0, 1 and 2 steps
    with pytest.warns(UserWarning) as caught:
        run(*flags, "--class-word", "zebra", "--output", tmp_path / "again")
    messages = [str(warning.message) for warning in caught]
    assert any("the bundled base does not know the class word 'zebra'" in text for text in messages)
    assert any(
        "does not know the class word 'zebra': it reads z e b r a" in text for text in messages
    )

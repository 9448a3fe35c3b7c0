"""Flags and settings that messages name exist and have the effect that the message states."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer

import customize
from customize.cli.app import app
from customize.training.config import TrainConfig
from customize.training.settings_file import RENAMED_SETTINGS
from tests.cli.making import Run, World, photos, refused

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SOURCES = Path(customize.__file__).parent


def flags(command: str) -> set[str]:
    actual = COMMANDS[command]
    shown = [p for p in actual.params if not getattr(p, "hidden", False)]
    return {f for p in shown for f in (*p.opts, *p.secondary_opts) if f.startswith("--")}


EVERY = {flag for command in COMMANDS if command != "library" for flag in flags(command)}
EVERY |= {
    flag
    for group in ("references", "rewriter")
    for command in COMMANDS[group].commands.values()
    for parameter in command.params
    for flag in parameter.opts
}


def texts() -> list[str]:
    """Return all string constants of the package except docstrings."""
    actual = []
    for path in sorted(SOURCES.rglob("*.py")):
        tree = ast.parse(path.read_text())
        docs = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        actual += [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docs
            and "storybook" not in path.parts
        ]
    return actual


def test_flags_named_in_messages_exist() -> None:
    others = {"--help", "--version", "--no-"}  # the last by prefix
    others |= {"--cpu", "--gpu_ids", "--multi_gpu"}  # accelerate's
    others |= {"--no-deps"}  # pip's
    others |= {"--head"}  # ray's
    named = {flag for text in texts() for flag in re.findall(r"--[a-z][\w-]*", text)}
    assert not named - EVERY - others


def test_messages_name_settings_with_their_flags() -> None:
    pattern = r"set (?:resume|[a-z_]+) to (\w+) \(--([\w-]+)(?: \w+)?\)"
    actual = [m for text in texts() for m in re.finditer(pattern, text)]
    assert len(actual) >= 10
    for match in actual:
        setting = match[0].split()[1]
        no = "no-" if match[1] in ("false", "no") and setting != "tracker" else ""
        assert match[2] == no + setting.replace("_", "-"), match[0]
        assert f"--{match[2]}" in flags("train")


def test_former_names_of_settings_are_hidden() -> None:
    for old in RENAMED_SETTINGS:
        assert old not in TrainConfig.model_fields
        assert f"--{old.replace('_', '-')}" not in flags("train")


def test_equal_flags_have_equal_metavars() -> None:
    """Equal metavars mean equal forms; exceptions are listed with reasons."""
    forms: dict[str, set[str]] = {}
    for command in COMMANDS:
        for parameter in getattr(COMMANDS[command], "params", ()):
            if getattr(parameter, "hidden", False):  # by a former name
                continue
            for flag in parameter.opts:
                if flag.startswith("--"):
                    forms.setdefault(flag, set()).add(str(parameter.metavar))
    plain = {"BASE": "TEXT", "FOLDER": "PATH", "LIBRARY": "PATH", "NAME": "TEXT"}
    differ = {
        flag: actual
        for flag, actual in forms.items()
        if len({plain.get(form, form) for form in actual}) > 1
    }
    # pareto's plot is a file; merge's METHOD is --merge, and train's is --method; the references of
    # generate may belong to words of the prompt, and its --together is that of a pipeline's call.
    assert differ.keys() <= {"--output", "--references", "--together"}, differ


SLIPS = {
    "train --lr 1": "--learning-rate",
    "train --learning_rate 1": "--learning-rate",
    "train --no-resum": "--no-resume",
    "train --avoid_weight 0": "--shared-directions-weight",
    "train --train-batch-size 4": "--batch-size",
    "merge --method sum": "--merge",
    "generate --num-inference-steps 3": "--steps",
    "generate --region x": "--regions",
    "generate --guidance_scale 3": "--guidance",
    "demo --folder x": "--output",
}


@pytest.mark.parametrize("arguments", SLIPS)
def test_near_flags_are_suggested(run: Run, arguments: str) -> None:
    command = arguments.split()[0]
    refused(
        run(*shlex.split(arguments)),
        f"did you mean {SLIPS[arguments]}",
        f"customize {command} --help",
    )
    assert SLIPS[arguments] in flags(command)


def test_unknown_flags_point_to_the_help(run: Run) -> None:
    result = run("train", "--zzzz")
    refused(result, "no such option: --zzzz", "see customize train --help")
    assert "did you mean" not in result.err


def test_the_suggested_flag_starts_a_new_run(run: Run, world: World, tmp_path: Path) -> None:
    images = photos(tmp_path / "photos")
    call = ["train", "--base", world.base, "--images", images, "--output", tmp_path / "out"]
    call += ["--name", "ann", "--class-word", "dog", "--rank", "2", "--steps", "1"]
    call += ["--preserve", "none", "--num-shared-directions", "0", "--no-record-inputs"]
    call += ["--device", "cpu", "--resolution", "32"]
    assert run(*call).code == 0
    result = run(*call, "--learning-rate", "1e-3")
    assert result.code == 2 and "learning_rate was 0.0001 and is 0.001" in result.err
    (advice,) = re.findall(r"\((--[\w-]+)\)", result.err)
    assert run(*call, "--learning-rate", "1e-3", advice).code == 0


def test_former_settings_in_a_file_still_load(run: Run, world: World, tmp_path: Path) -> None:
    from customize.training.config import load_config

    text = f"base: {world.base}\nimages: i\noutput: o\nname: ann\nclass_word: dog\n"
    file = tmp_path / "run.yaml"
    file.write_text(text + "avoid: 3\navoid_weight: 0.5\ndensity: uniform\n")
    config = load_config(file)
    assert (config.num_shared_directions, config.shared_directions_weight) == (3, 0.5)
    assert config.timestep_density == "uniform"
    assert load_config(file, num_shared_directions=4).num_shared_directions == 4
    file.write_text(text + "avoid: 3\nnum_shared_directions: 4\n")
    refused(run("train", "--config", file), "avoid and num_shared_directions are the same setting")


def test_former_flags_still_work_with_a_warning(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = []

    def load_configs(*call: object, **settings: object) -> None:
        arguments.append(settings)
        raise typer.Exit

    monkeypatch.setattr("customize.training.joint_configs.load_configs", load_configs)
    old = {"avoid": "0", "basis": "gaussian_qr", "density": "cosmap"}
    call = [text for name, value in old.items() for text in (f"--{name}", value)]
    with pytest.warns(UserWarning) as caught:
        assert run("train", *call).code == 0
    assert {str(warning.message) for warning in caught} == {
        "--avoid is now called --num-shared-directions",
        "--basis is now called --orthogonal-matrix",
        "--density is now called --timestep-density",
    }
    assert arguments[0] == old  # TrainConfig reads it by either name


def test_near_presets_are_suggested(run: Run, tmp_path: Path) -> None:
    presets = SOURCES.parent / "scripts" / "presets"
    for arguments in ("sd15-8gb", "sd15-8g.yaml"):
        refused(run("train", "--config", arguments), f"did you mean {presets / 'sd15-8gb.yaml'}?")
    far = run("train", "--config", tmp_path / "sd15-8gb")
    assert far.code == 2 and "did you mean" not in far.err


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_fits_80_columns(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from customize.cli import main

    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for flag in flags(command) if command != "library" else ():
        assert flag in out  # not cut off

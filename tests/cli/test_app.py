"""The registry of commands: a command is one file and one line."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pytest
import typer

import customize.cli
from customize.cli import main
from customize.cli.app import COMMANDS, build_app
from customize.cli.interrupts import on_interrupt
from customize.errors import ConfigError


@on_interrupt("interrupted")
def toy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name to greet")],
    times: Annotated[int, typer.Option(min=1, metavar="N", help="Number of greetings")] = 1,
) -> None:
    """Greet someone.

    customize toy rex --times 2
    """
    if name == "nobody":
        raise ConfigError("nobody cannot be greeted", fix="name somebody")
    print(" ".join([f"hello {name}"] * times))


@pytest.fixture
def with_toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("customize.cli.app.app", build_app({**COMMANDS, "toy": toy}))
    make_command = customize.cli._make_command
    make_command.cache_clear()
    yield
    make_command.cache_clear()


@pytest.mark.usefixtures("with_toy")
def test_a_registered_command_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy", "rex", "--times", "2"]) == 0
    assert capsys.readouterr().out == "hello rex hello rex\n"


@pytest.mark.usefixtures("with_toy")
def test_a_registered_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert re.search(r"^  toy +Greet someone\.$", capsys.readouterr().out, re.MULTILINE)
    assert main(["toy", "--help"]) == 0
    out = capsys.readouterr().out
    assert "\n  customize toy rex --times 2\n" in out
    assert "NAME  Name to greet" in out and "--times N   Number of greetings" in out
    assert out.index("Arguments:") < out.index("Options:")


@pytest.mark.usefixtures("with_toy")
def test_errors_of_a_registered_command_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy", "nobody"]) == 2
    assert capsys.readouterr().err == ("error: nobody cannot be greeted. Fix: name somebody.\n")
    assert main(["toy", "rex", "--time", "2"]) == 2
    assert "did you mean --times?" in capsys.readouterr().err


def test_each_command_is_a_file_of_its_name() -> None:
    files = {path.stem for path in Path(customize.cli.__file__).parent.glob("*_command.py")}
    assert files == {f"{name}_command" for name in COMMANDS}
    for name, command in COMMANDS.items():
        if not isinstance(command, typer.Typer):
            module = sys.modules[inspect.unwrap(command).__module__]
            assert module.__name__ in (
                f"customize.cli.{name}_command",
                "customize.cli.config_flags",  # train's flags are generated
            )


def test_summaries_are_not_cut_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (["--help"], ["library", "--help"]):
        assert main(arguments) == 0
        assert "..." not in capsys.readouterr().out.split("Commands:")[1]

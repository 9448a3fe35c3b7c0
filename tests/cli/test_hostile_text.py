"""Text of files on the terminal: without escape sequences, markup and invisible characters."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from customize.cli import _print_warning
from customize.cli.terminal import console
from tests.concepts.library.test_library import lora

TEXT = "\x1b[31mred\x1b]8;;http://evil\x07 [bold]b[/bold] [link=http://evil]x[/link] :smile: \u202e"


def harmless(text: str) -> None:
    assert all(char.isprintable() or char == "\n" for char in text), ascii(text)
    text.encode()


def test_a_library_of_hostile_files(run, tmp_path: Path) -> None:
    name = f"{TEXT.replace('/', '')} {os.fsdecode(bytes([255]))}"
    lora(tmp_path / f"{name}.safetensors", **{"modelspec.trigger_phrase": TEXT})
    (tmp_path / f"{name} 2.safetensors").write_bytes(b"x")
    for arguments in (["list", tmp_path], ["check", tmp_path]):
        result = run("library", *arguments)
        harmless(result.out + result.err)
        assert "[bold]" in result.out or arguments[0] == "check"
    result = run("inspect", tmp_path / f"{name}.safetensors")
    harmless(result.out + result.err)
    result = run("inspect", tmp_path / f"{TEXT}.safetensors")
    harmless(result.out + result.err)
    assert result.code == 2
    result = run(TEXT)
    harmless(result.out + result.err)
    assert result.code == 2


def test_the_console_prints_verbatim(capsys) -> None:
    from rich.table import Table

    out = console()
    table = Table(TEXT[:10])
    table.add_row(TEXT)
    out.print(table)
    out.print(TEXT, soft_wrap=True)
    shown = capsys.readouterr().out
    harmless(shown)
    assert "[link=http://evil]" in shown and ":smile:" in shown and "\\x1b[31mred" in shown


def test_warnings_are_escaped(capsys) -> None:
    with warnings.catch_warnings():
        _print_warning(UserWarning(TEXT), UserWarning, "file", 1)
    harmless(capsys.readouterr().err)

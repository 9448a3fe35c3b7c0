"""Output on the terminal: a safe console, indented text, the command line as the user typed it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from customize.text import escape_unprintable

if TYPE_CHECKING:
    from rich.console import Console


def console(stderr: bool = False) -> Console:
    """A rich console that prints text verbatim.

    Square brackets are not parsed as markup, control characters are escaped, and only the first of
    several processes (accelerate, torchrun) prints.
    """
    from rich.console import Console
    from rich.segment import Segment

    class HarmlessConsole(Console):
        def render(self, *args: Any, **kwargs: Any) -> Iterator[Segment]:
            for segment in super().render(*args, **kwargs):
                text, style, control = segment
                yield segment if control else Segment(escape_unprintable(text), style)

    quiet = os.environ.get("RANK", "0") != "0"
    return HarmlessConsole(stderr=stderr, quiet=quiet, highlight=False, markup=False, emoji=False)


def print_line(text: str, stderr: bool = False) -> None:
    """Print text without wrapping it at the terminal's width."""
    console(stderr).print(text, soft_wrap=True)


def indented(text: str) -> str:
    """The text with each line indented by four spaces."""
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def command_line() -> str:
    """The command that started this process, quoted for a shell."""
    import shlex

    return shlex.join(["customize", *sys.argv[1:]])

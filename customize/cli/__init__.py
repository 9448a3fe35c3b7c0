"""The command ``customize``. Heavy libraries are imported only by the commands that need them."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TextIO

from customize.cli.interrupts import INTERRUPTED, current, handle_interrupts, print_last_line
from customize.text import escape_unprintable

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: what stands behind ``customize`` on the command line; None: that of this process.

    Returns:
        The exit code: 0; 2 after bad input or anything else that the pack refuses, with one line
        on stderr; 130 after Ctrl-C, with a line on how to go on.
    """
    with handle_interrupts(to_the_end=argv is None):
        try:
            code = _run(argv)
            current.finished = True
        except KeyboardInterrupt:  # between two commands' own lines
            return print_last_line("interrupted", INTERRUPTED)
        if current.received and code == 0:
            return print_last_line("interrupted", INTERRUPTED)
        return code


def _run(argv: Sequence[str] | None) -> int:
    from customize.errors import (
        DISK_ERRORS,
        CustomizeError,
        TrainingStopped,
        storage_error,
        system_errno,
    )

    if argv is None:
        _hush_libraries()
        warnings.showwarning = _show_note
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        import typer

        from customize.cli.app import app
        from customize.cli.command_support import Interrupted

        # Typer brings its own copy of click since 0.26 and does not export the base of its errors.
        usage_error: Any = typer.BadParameter.__mro__[2]
        command = typer.main.get_command(app)
    except KeyboardInterrupt:
        return print_last_line("interrupted before anything was done", INTERRUPTED)
    try:
        code = command.main(arguments or ["--help"], prog_name="customize", standalone_mode=False)
        if code == INTERRUPTED:  # typer's, for an interrupt outside of the command's own function
            return print_last_line("interrupted", INTERRUPTED)
        return code if isinstance(code, int) else 0
    except (Interrupted, TrainingStopped) as stop:
        return print_last_line(str(stop), INTERRUPTED)
    except (KeyboardInterrupt, typer.Abort):
        return print_last_line("interrupted", INTERRUPTED)
    except CustomizeError as error:
        return print_last_line(f"error: {error}", 2)
    except usage_error as error:
        return print_last_line(f"error: {_explained(error)}", 2)
    except Exception as error:
        # Wherever it happens, also in another library or on stdout.
        if system_errno(error) not in DISK_ERRORS:
            raise
        where = getattr(error, "filename", None) or "the output"
        return print_last_line(f"error: {storage_error(error, where)}", 2)


def _hush_libraries() -> None:
    """What the libraries say on the way would come between the lines of a command; what matters of
    it is in our errors. Read when they are imported, and what a user has set stays."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    for logger in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # of GPU kernels on a CPU
        logging.getLogger(logger).setLevel(logging.ERROR)


def _show_note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """What is meant for users in a line, without the place in the code that Python adds."""
    told = f"note: {message}" if category is UserWarning else f"{category.__name__}: {message}"
    with suppress(OSError):  # the terminal may be gone
        print(escape_unprintable(told), file=sys.stderr if file is None else file, flush=True)


def _explained(error: BaseException) -> str:
    """Typer's message on one line, the flag or command that was meant, and where help is."""
    context = getattr(error, "ctx", None)
    path = "customize" if context is None else context.command_path
    flag = getattr(error, "option_name", None)
    if flag is not None and context is not None:
        from customize.cli.config_flags import suggest_flag

        hint = suggest_flag(flag, context.command)
        return f"no such option: {flag}. Fix: {hint}see {path} --help."
    message = " ".join(error.format_message().split())  # type: ignore[attr-defined]
    message = message.rstrip(".")
    return f"{message}{'' if message.endswith('?') else '.'} Fix: see {path} --help."

"""The command ``customize``; torch and diffusers are imported only by commands that need them."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TextIO

from customize.cli.interrupts import INTERRUPTED, handle_interrupts, handler, print_last_line
from customize.text import escape_unprintable

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments of the command line; None: those of this process.

    Returns:
        The exit code: 0; 2 after an error of the user, with one line on stderr; 130 after Ctrl-C,
        with a line of advice.
    """
    with handle_interrupts(exit_afterwards=argv is None):
        try:
            code = _run(argv)
            handler.finished = True
        except KeyboardInterrupt:  # outside of the command's function
            return print_last_line("interrupted", INTERRUPTED)
        if handler.received and code == 0:
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
        _silence_libraries()
        warnings.showwarning = _print_warning
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        import typer

        from customize.cli.interrupts import Interrupted

        # Typer bundles click since 0.26 and does not export the base class of its errors.
        usage_error: Any = typer.BadParameter.__mro__[2]
        command = _make_command()
    except KeyboardInterrupt:
        return print_last_line("interrupted before the command started", INTERRUPTED)
    try:
        code = command.main(arguments or ["--help"], prog_name="customize", standalone_mode=False)
        if code == INTERRUPTED:  # typer's, for an interrupt outside of the command's function
            return print_last_line("interrupted", INTERRUPTED)
        return code if isinstance(code, int) else 0
    except (Interrupted, TrainingStopped) as stop:
        return print_last_line(str(stop), INTERRUPTED)
    except (KeyboardInterrupt, typer.Abort):
        return print_last_line("interrupted", INTERRUPTED)
    except CustomizeError as error:
        return print_last_line(f"error: {error}", 2)
    except usage_error as error:
        return print_last_line(f"error: {_explain_usage_error(error)}", 2)
    except Exception as error:
        # A full disk, in any library or on stdout.
        if system_errno(error) not in DISK_ERRORS:
            raise
        file = getattr(error, "filename", None) or "the output"
        return print_last_line(f"error: {storage_error(error, file)}", 2)


@functools.cache
def _make_command() -> Any:
    """The command with its subcommands, which typer makes from their functions."""
    import typer

    from customize.cli.app import app

    return typer.main.get_command(app)


def _silence_libraries() -> None:
    """Silence the logs of libraries, unless the user set their environment variables.

    Must run before they are imported. Their errors are repeated in ours.
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    for logger in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # of GPU kernels on a CPU
        logging.getLogger(logger).setLevel(logging.ERROR)


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning on one line, without the source location that Python adds."""
    text = f"note: {message}" if category is UserWarning else f"{category.__name__}: {message}"
    with suppress(OSError):  # the terminal may be gone
        print(escape_unprintable(text), file=sys.stderr if file is None else file, flush=True)


def _explain_usage_error(error: BaseException) -> str:
    """Typer's message on one line, with the nearest flag and the help command."""
    context = getattr(error, "ctx", None)
    path = "customize" if context is None else context.command_path
    flag = getattr(error, "option_name", None)
    if flag is not None and context is not None:
        from customize.cli.plain_help import suggest_flag

        hint = suggest_flag(flag, context.command)
        return f"no such option: {flag}. Fix: {hint}see {path} --help."
    message = " ".join(error.format_message().split())  # type: ignore[attr-defined]
    message = message.rstrip(".")
    return f"{message}{'' if message.endswith('?') else '.'} Fix: see {path} --help."

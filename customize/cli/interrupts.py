"""Ctrl-C during a command: the command ends with exit code 130 and a line of advice.

Python raises KeyboardInterrupt at any bytecode. During an import this leaves libraries half
imported, and some catch it: torch does while it imports numpy, and fails much later with a
RecursionError or an abort. An interrupt during an import therefore waits for the import to finish,
or ends the process after a second. Files are written atomically, so the next run can resume.
"""

from __future__ import annotations

import _thread
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import ParamSpec, TypeVar

from customize.text import one_line

P = ParamSpec("P")
R = TypeVar("R")

#: The exit code of a process that SIGINT ended, as shells report it.
INTERRUPTED = 130
_MAX_WAIT = 1.0  # seconds
_POLL_INTERVAL = 0.02  # seconds


class Interrupted(Exception):
    """Ctrl-C ended the command; the text is the line to print."""


class InterruptHandler:
    """The SIGINT handler of a command.

    Attributes:
        advice: Line to print when the command ends.
        received: Whether an interrupt arrived during an import. The command then counts as
            interrupted even if it finishes before the import does.
        finished: Whether the command has finished, so that an interrupt ends the process at once.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Prepare for a new command."""
        self.advice = "interrupted"
        self.received = self.finished = self._waiting = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGINT.

        Raises:
            KeyboardInterrupt: No import is running.
        """
        if self.finished:
            self.exit_process()
        if not _is_importing(frame):
            raise KeyboardInterrupt
        if self._waiting:  # pressed twice
            self.exit_process()
        self.received = self._waiting = True
        threading.Thread(target=self._wait_for_import, daemon=True).start()

    def exit_process(self) -> None:
        """End the process at once."""
        print_last_line(self.advice, INTERRUPTED)
        os._exit(INTERRUPTED)

    def _wait_for_import(self) -> None:
        main, limit = threading.main_thread().ident, time.monotonic() + _MAX_WAIT
        while _is_importing(sys._current_frames().get(main or 0)):
            if time.monotonic() > limit:
                self.exit_process()
            time.sleep(_POLL_INTERVAL)
        self._waiting = False
        _thread.interrupt_main()


#: The handler of this process.
handler = InterruptHandler()


def on_interrupt(advice: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a command so that Ctrl-C raises :class:`Interrupted` with this advice."""

    def decorate(command: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(command)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            handler.advice = advice
            try:
                return command(*args, **kwargs)
            except KeyboardInterrupt:
                raise Interrupted(advice) from None

        return run

    return decorate


@contextmanager
def handle_interrupts(exit_afterwards: bool) -> Iterator[None]:
    """Install :data:`handler` for SIGINT, unless SIGINT is ignored or already handled.

    Args:
        exit_afterwards: Whether the process ends with the command, so that a later Ctrl-C ends it
            at once.
    """
    handler.reset()
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        if exit_afterwards:
            signal.signal(signal.SIGINT, lambda number, frame: handler.exit_process())
        else:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def print_last_line(line: str, code: int) -> int:
    """Print the last line of a command to stderr, also if stdout or stderr is closed.

    Returns:
        ``code``.
    """
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{one_line(line)}\n")):
        try:
            stream.write(text)
            stream.flush()
        except (OSError, RuntimeError, ValueError):
            # Otherwise Python fails again when it flushes at exit, with another exit code.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False

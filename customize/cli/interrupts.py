"""Ctrl-C at every moment of a command: it ends with "interrupted" and the exit status 130.

Python raises KeyboardInterrupt wherever it is. In the middle of an import that leaves libraries
half imported, and some catch it: torch does so while it imports numpy, and fails much later with a
RecursionError or an abort. So an interrupt during an import waits until the import is over, or
ends the process where that takes too long. A killed process leaves nothing that the next run cannot
go on from.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from customize.text import one_line

INTERRUPTED = 130  # as shells have it for SIGINT
_PATIENCE = 1.0  # seconds
_TICK = 0.02


class Interrupts:
    """What Ctrl-C does to a command.

    Attributes:
        advice: the line to print at the end.
        received: whether it came during an import, so that the command counts as interrupted even
            if it is over before the import's end is noticed.
        finished: whether the command is over, so that the process ends at once.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin a command."""
        self.advice = "interrupted"
        self.received = self.finished = self._waiting = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signal.

        Raises:
            KeyboardInterrupt: nothing is being imported.
        """
        if self.finished:
            self.end()
        if not _is_importing(frame):
            raise KeyboardInterrupt
        if self._waiting:  # pressed twice
            self.end()
        self.received = self._waiting = True
        threading.Thread(target=self._wait, daemon=True).start()

    def end(self) -> None:
        """End the process at once."""
        print_last_line(self.advice, INTERRUPTED)
        os._exit(INTERRUPTED)

    def _wait(self) -> None:
        main, limit = threading.main_thread().ident, time.monotonic() + _PATIENCE
        while _is_importing(sys._current_frames().get(main or 0)):
            if time.monotonic() > limit:
                self.end()
            time.sleep(_TICK)
        self._waiting = False
        _thread.interrupt_main()


#: The command that runs.
current = Interrupts()


@contextmanager
def handle_interrupts(to_the_end: bool) -> Iterator[None]:
    """Within it Ctrl-C is dealt with as above, if it would raise KeyboardInterrupt.

    Args:
        to_the_end: the process ends with the command, so that afterwards Ctrl-C ends it at once.
    """
    current.reset()
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield  # ignored, as in the background; or somebody else's
        return
    signal.signal(signal.SIGINT, current)
    try:
        yield
    finally:
        if to_the_end:
            signal.signal(signal.SIGINT, lambda number, frame: current.end())
        else:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def print_last_line(line: str, code: int) -> int:
    """Print a command's last line, also where the terminal or the reader of a pipe is gone.

    Returns:
        The exit code that was given.
    """
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{one_line(line)}\n")):
        try:
            stream.write(text)
            stream.flush()
        except (OSError, RuntimeError, ValueError):
            # Else Python fails again when it flushes at its end, with another exit code.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False

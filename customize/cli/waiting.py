"""Lines on stderr while a command works on something long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from customize.cli.terminal import print_line

#: Seconds until the first line, and between lines.
FIRST, INTERVAL = 3.0, 10.0


@contextmanager
def report_waiting(describe: Callable[[], str]) -> Iterator[None]:
    """Print what a command works on, and since when, at intervals until the context ends.

    Args:
        describe: Returns what it works on now, such as "rewriting, 3 of 10 prompts done".
    """
    start, is_done = time.monotonic(), threading.Event()

    def print_lines() -> None:
        seconds = FIRST
        while not is_done.wait(seconds):
            print_line(f"{describe()} ({time.monotonic() - start:.0f} s)", stderr=True)
            seconds = INTERVAL

    thread = threading.Thread(target=print_lines, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
        thread.join()

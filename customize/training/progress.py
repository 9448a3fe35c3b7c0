"""What a run shows on the way: a line for each phase, and a bar where its length is known.

Lines go to stdout, and bars to stderr, where after bad input only the error stands. On a terminal
and in a notebook bars move; elsewhere, as in a log file, each is a line at the beginning, one every
half a minute, and one at the end.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

_EVERY = 30.0  # seconds between lines
_LINES = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Progress:
    """Shows the phases of a run.

    Args:
        shown: show anything. Of several processes only the first does.
    """

    def __init__(self, shown: bool) -> None:
        self.shown = shown and os.environ.get("RANK", "0") == "0"

    def line(self, text: str) -> None:
        """Show a line, beside the bars that move."""
        if self.shown:
            from tqdm.auto import tqdm

            with suppress(OSError, ValueError):  # the terminal may be gone
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()

    @contextmanager
    def phase(self, text: str, after: float = 0.0) -> Iterator[None]:
        """Show that something begins whose length is not known, and how long it took.

        Args:
            after: seconds; what is over by then is not shown.
        """
        began = time.perf_counter()
        timer = threading.Timer(after, self.line, [f"{text} ..."])
        timer.daemon = True
        if after:
            timer.start()
        else:
            self.line(f"{text} ...")
        try:
            yield
        finally:
            timer.cancel()
        seconds = time.perf_counter() - began
        if seconds >= 1.0:
            self.line(f"{text}: {seconds:.0f} s")

    def track(self, items: Sequence[T], text: str) -> Iterator[T]:
        """The items, with a bar of how many are done."""
        with self.bar(len(items), text, "it") as bar:
            for item in items:
                yield item
                bar.update()

    @contextmanager
    def bar(self, total: int, text: str, unit: str, first: int = 0) -> Iterator[Any]:
        """A bar of tqdm's.

        Args:
            first: how many are done already.
        """
        from tqdm.auto import tqdm

        moving = "ipykernel" in sys.modules or sys.stderr.isatty()
        how: dict[str, Any] = {} if moving else {"file": _Lines(sys.stderr), "bar_format": _LINES}
        if not moving:
            how |= {"mininterval": _EVERY, "maxinterval": _EVERY}
        with tqdm(
            total=total, initial=first, disable=not self.shown, desc=text, unit=unit, **how
        ) as bar:
            yield bar


#: Shows nothing.
NO_PROGRESS = Progress(False)


def without_progress(items: Iterable[T], text: str) -> Iterable[T]:
    """:meth:`Progress.track` without a bar."""
    return items


class _Lines:
    """A stream on which what tqdm would draw over the last state is a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._last = stream, ""

    def write(self, text: str) -> int:
        line = text.strip("\r\n ")
        if line and line != self._last:
            with suppress(OSError, ValueError):
                self._stream.write(f"{line}\n")
            self._last = line
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

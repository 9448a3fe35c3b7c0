"""Progress output of a run: a line per phase, and a bar for phases of known length.

Lines are written to stdout and bars to stderr. On a terminal and in a notebook, bars are redrawn in
place; elsewhere, such as in a log file, a bar is a line at its start, every 30 seconds and at its
end.
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

_INTERVAL = 30.0  # seconds between lines
_BAR_FORMAT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Progress:
    """Shows the phases of a run.

    Args:
        shown: Whether to show anything; processes of another rank than 0 show nothing.
    """

    def __init__(self, shown: bool) -> None:
        self.shown = shown and os.environ.get("RANK", "0") == "0"

    def line(self, text: str) -> None:
        """Show a line above the bars."""
        if self.shown:
            from tqdm.auto import tqdm

            with suppress(OSError, ValueError):  # the terminal may be closed
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()

    @contextmanager
    def phase(self, text: str, after: float = 0.0) -> Iterator[None]:
        """Show the start and the duration of a phase of unknown length.

        Args:
            text: Description of the phase.
            after: Seconds until the start is shown; shorter phases do not show it.
        """
        start = time.perf_counter()
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
        seconds = time.perf_counter() - start
        if seconds >= 1.0:
            self.line(f"{text}: {seconds:.0f} s")

    def track(self, items: Sequence[T], text: str) -> Iterator[T]:
        """Iterate over the items with a bar.

        Args:
            items: The items.
            text: Description of the bar.
        """
        with self.bar(len(items), text, "it") as bar:
            for item in items:
                yield item
                bar.update()

    @contextmanager
    def bar(self, total: int, text: str, unit: str, first: int = 0) -> Iterator[Any]:
        """Show a bar of tqdm.

        Args:
            total: Number of steps.
            text: Description of the bar.
            unit: Unit of the steps, such as "it".
            first: Number of steps done before the bar starts.
        """
        from tqdm.auto import tqdm

        options: dict[str, Any] = {}
        if "ipykernel" not in sys.modules and not sys.stderr.isatty():
            options = {"file": _LineStream(sys.stderr), "bar_format": _BAR_FORMAT}
            options |= {"mininterval": _INTERVAL, "maxinterval": _INTERVAL}
        with tqdm(
            total=total, initial=first, disable=not self.shown, desc=text, unit=unit, **options
        ) as bar:
            yield bar


def without_progress(items: Iterable[T], text: str) -> Iterable[T]:
    """Return the items; the counterpart of :meth:`Progress.track` without a bar."""
    return items


class _LineStream:
    """A stream that writes each state of a bar as a new line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._previous = stream, ""

    def write(self, text: str) -> int:
        line = text.strip("\r\n ")
        if line and line != self._previous:
            with suppress(OSError, ValueError):
                self._stream.write(f"{line}\n")
            self._previous = line
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

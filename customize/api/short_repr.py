"""A short ``repr`` for pipelines that are customized.

``pipe.load_custom(...)`` returns the pipeline, so that it can follow ``from_pretrained`` at once.
In an interactive session diffusers then prints the whole configuration; instead of that a pipeline
with concepts, a library, a chosen backend or a memory plan shows what ``pipe.custom`` does, and in
such a session one from which they were unloaded as well. All other pipelines print what diffusers
has for them.
"""

from __future__ import annotations

import functools
import sys
from typing import Any
from weakref import WeakSet

_MARK = "_customize_repr"
_unloaded: WeakSet[Any] = WeakSet()


def note_unloaded(pipe: Any) -> None:
    """Show what ``pipe.unload_custom()`` returns briefly in interactive sessions."""
    _unloaded.add(pipe)


def shorten_repr(host: Any) -> None:
    """Give a base class of pipelines the short ``repr``; may be called any number of times."""
    stock = host.__repr__
    if hasattr(stock, _MARK):
        return

    @functools.wraps(stock)
    def brief(self: Any) -> str:
        if "customize.pipeline.state" not in sys.modules:  # nothing was ever attached
            return str(stock(self))
        from customize.pipeline.report import summarize

        shown = summarize(self)
        interactive = hasattr(sys, "ps1")
        if interactive and self in _unloaded:
            return f"{type(self).__name__}: {shown!r}"
        if not (shown.rows or shown.attention or shown.memory or shown.library or shown.avoid):
            return str(stock(self))
        return f"{type(self).__name__}: {shown!r}"

    setattr(brief, _MARK, True)
    host.__repr__ = brief

"""A short ``repr`` for pipelines that are customized.

``pipe.load_custom(...)`` returns the pipeline, so that it can follow ``from_pretrained`` at once.
In an interactive session diffusers then prints the whole configuration. A pipeline with concepts, a
library, a chosen backend or a memory plan shows the report of ``pipe.custom`` instead; in such a
session, so does a pipeline from which they were unloaded. All other pipelines keep diffusers'
``repr``.
"""

from __future__ import annotations

import functools
import sys
from typing import Any
from weakref import WeakSet

from customize.stages import load_stages

_unloaded: WeakSet[Any] = WeakSet()


def note_unloaded(pipe: Any) -> None:
    """Shorten the ``repr`` of an unloaded pipeline in interactive sessions."""
    _unloaded.add(pipe)


def shorten_repr(base: Any) -> None:
    """Give a base class of pipelines the short ``repr``; may be called any number of times."""
    stock = base.__repr__
    if hasattr(stock, "_customize_patched"):
        return

    @functools.wraps(stock)
    def repr_customized(self: Any) -> str:
        if "customize.pipeline.attach" in sys.modules:  # else nothing was ever attached
            from customize.pipeline.report import report_customization

            report = report_customization(self, load_stages())
            if not report.is_empty or (hasattr(sys, "ps1") and self in _unloaded):
                return f"{type(self).__name__}: {report!r}"
        return str(stock(self))

    repr_customized._customize_patched = True  # type: ignore[attr-defined]
    base.__repr__ = repr_customized

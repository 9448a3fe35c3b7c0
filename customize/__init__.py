"""Personal concepts for diffusers pipelines: learn them, merge them, draw them.

::

    import customize
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("base").load_custom("concepts/rex", "concepts/tom")
    pipe("<rex> and <tom> on a beach").images[0]
    pipe.unload_custom()

Importing this package imports neither torch nor diffusers. It gives diffusers' pipelines three
attributes, ``load_custom``, ``unload_custom`` and ``custom``, now or when they are imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from customize.hosts.binding import (
    bind,
    load_custom,
    memory_plan,
    record_inputs,
    unload_custom,
)

if TYPE_CHECKING:
    from customize.concepts.concept import Concept
    from customize.hosts.decor import Decor

__all__ = [
    "Concept",
    "Decor",
    "__version__",
    "load_custom",
    "memory_plan",
    "record_inputs",
    "unload_custom",
]

__version__ = "0.1.0"

bind()


def __getattr__(name: str) -> Any:
    if name == "Concept":
        from customize.concepts.concept import Concept

        return Concept
    if name == "Decor":
        from customize.hosts.decor import Decor

        return Decor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Personal concepts for diffusers pipelines: learn them, merge them, draw them.

::

    import customize
    from diffusers import DiffusionPipeline

    customize.train(base="base", images="photos", output="rex", name="rex", class_word="dog")
    pipe = DiffusionPipeline.from_pretrained("base").load_custom("rex", "concepts/tom")
    pipe("<rex> and <tom> on a beach").images[0]
    pipe.unload_custom()
    customize.merge("rex", "concepts/tom", output="duo")

Importing this package imports neither torch nor diffusers. It gives diffusers' pipelines three
attributes, ``load_custom``, ``unload_custom`` and ``custom``, now or when they are imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from customize.api.pipeline_methods import (
    load_custom,
    memory_plan,
    patch_pipelines,
    record_inputs,
    unload_custom,
)

if TYPE_CHECKING:
    from customize.api.inspect_files import inspect
    from customize.api.merge_files import merge
    from customize.api.train_concept import train
    from customize.api.train_references import train_references
    from customize.concepts.io.read_concept import load_concept
    from customize.concepts.io.write_concept import save_concept
    from customize.concepts.library.library import Library
    from customize.concepts.types import Concept
    from customize.stages.avoid import Decor
    from customize.stages.references import References
    from customize.stages.rewrite import Rewriter
    from customize.training.config import TrainConfig

#: What is imported when it is first used -> from where.
_LATER = {
    "Concept": "customize.concepts.types",
    "Decor": "customize.stages.avoid",
    "Library": "customize.concepts.library.library",
    "References": "customize.stages.references",
    "Rewriter": "customize.stages.rewrite",
    "TrainConfig": "customize.training.config",
    "inspect": "customize.api.inspect_files",
    "load_concept": "customize.concepts.io.read_concept",
    "merge": "customize.api.merge_files",
    "save_concept": "customize.concepts.io.write_concept",
    "train": "customize.api.train_concept",
    "train_references": "customize.api.train_references",
}

__all__ = [
    "Concept",
    "Decor",
    "Library",
    "References",
    "Rewriter",
    "TrainConfig",
    "__version__",
    "inspect",
    "load_concept",
    "load_custom",
    "memory_plan",
    "merge",
    "record_inputs",
    "save_concept",
    "train",
    "train_references",
    "unload_custom",
]

__version__ = "0.1.0"

patch_pipelines()


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    from customize.near_names import did_you_mean

    hint = did_you_mean(name, __all__) if not name.startswith("_") else ""
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}" + (f"; {hint}" if hint else "")
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""What the shared models themselves refuse while an adapter of ours is on them.

Any pipeline of the same components reaches them, also one that ``load_custom`` never saw.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from types import MethodType
from typing import Any

from customize.errors import PipelineError

#: peft's name of the one adapter that all concepts are merged into.
ADAPTER = "customize"


def guard(model: Any, layers: Iterable[Any]) -> None:
    """Let a model and its layers refuse to merge our adapter into the weights.

    Once merged, ``unload_lora_weights`` leaves it there, and nothing takes it out again. The model
    refuses first, before the adapters of other layers are merged; of text encoders diffusers
    merges the layers one by one.

    Args:
        layers: peft's LoRA layers that carry the adapter.
    """
    for each, name in ((model, "fuse_lora"), *((layer, "merge") for layer in layers)):
        if hasattr(type(each), name):  # text encoders have no fuse_lora
            # On the object, since `from_pipe` takes a model of no other class than its own.
            setattr(each, name, MethodType(_refusing(getattr(type(each), name)), each))


def unguard(model: Any, layers: Iterable[Any]) -> None:
    """Undo :func:`guard`, also where someone took the adapter away."""
    vars(model).pop("fuse_lora", None)
    for layer in layers:
        vars(layer).pop("merge", None)


def _refusing(merge: Any) -> Any:
    @functools.wraps(merge)
    def refusing(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(merge).bind(self, *args, **kwargs).arguments
        names = given.get("adapter_names")
        if ADAPTER in (active_adapters([self]) if names is None else names):
            raise PipelineError(
                "fuse_lora would put the attached concepts into the weights, where unload_custom "
                "could not take them out",
                fix="attach them with load_custom(..., fuse=True), or name the adapters to fuse: "
                'fuse_lora(adapter_names=["mine"])',
            )
        return merge(self, *args, **kwargs)

    return refusing


def active_adapters(models: Iterable[Any]) -> list[str]:
    """The names of the adapters that are active in any layer of the models, each once."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = [module for model in models for module in model.modules()]
    layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))

"""What the shared components themselves refuse while concepts are on them: to merge our adapter,
to be saved, and to be copied by the names of their layers.

Any pipeline of the same components reaches them, and so does who saves one of them by itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from customize.errors import PipelineError

#: peft's name of the one adapter that all concepts are merged into.
ADAPTER_NAME = "customize"

#: The methods of models, and of whole pipelines, that write their weights somewhere.
SAVE_METHODS = ("save_pretrained", "push_to_hub")
_SAVING_PART = (*SAVE_METHODS, "save_lora_adapter")

#: Where each component carries the mark that tells whose it is, and whether it can be saved.
TAG_ATTRIBUTE = "_customize_mark"


def guard_fusing(model: Any, layers: Iterable[Any]) -> None:
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


def unguard_fusing(model: Any, layers: Iterable[Any]) -> None:
    """Undo :func:`guard_fusing`, also where someone took the adapter away."""
    vars(model).pop("fuse_lora", None)
    for layer in layers:
        vars(layer).pop("merge", None)


def _refusing(merge: Any) -> Any:
    @functools.wraps(merge)
    def refusing(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(merge).bind(self, *args, **kwargs).arguments
        names = given.get("adapter_names")
        if ADAPTER_NAME in (active_adapters([self]) if names is None else names):
            raise PipelineError(
                "fuse_lora would put the attached concepts into the weights, where unload_custom "
                "could not take them out",
                fix="attach them with load_custom(..., fuse=True), or name the adapters to fuse: "
                'fuse_lora(adapter_names=["mine"])',
            )
        return merge(self, *args, **kwargs)

    return refusing


def guard_saving(part: Any) -> None:
    """Let a component refuse to be saved where that would lose what is attached to it, which its
    mark tells.

    A model would write its layers under the names that they have with an adapter, and whoever
    opens that gets new, random weights for them without an error.

    Args:
        part: a model or tokenizer.
    """
    for name in _SAVING_PART:
        if hasattr(type(part), name):
            setattr(part, name, _Saving(part, name))


def unguard_saving(part: Any) -> None:
    """Undo :func:`guard_saving`."""
    for name in _SAVING_PART:
        vars(part).pop(name, None)


def make_unsaveable_error(reason: str) -> PipelineError:
    """Of what cannot be saved as it is."""
    return PipelineError(
        reason,
        fix="save without them after unload_custom(), as they have files of their own; or "
        "attach them with fuse=True and save them in the weights, unless they have "
        "embeddings for each layer",
    )


@dataclass(frozen=True, eq=False)
class _Saving:
    """A method of a component that writes it; asks the component's mark first.

    An object and no closure, so that copies and pickles of the component ask their own.
    """

    part: Any
    name: str

    @property
    def _method(self) -> Any:
        return getattr(type(self.part), self.name).__get__(self.part)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        # Another adapter of the same model can be saved.
        is_ours = bound.arguments.get("adapter_name", ADAPTER_NAME) == ADAPTER_NAME
        mark = vars(self.part).get(TAG_ATTRIBUTE)
        if is_ours and mark is not None and mark.unsaveable:
            raise make_unsaveable_error(mark.unsaveable)
        return self._method(*args, **kwargs)


def check_copyable(parts: Iterable[Any], maker: str) -> None:
    """Refuse to copy weights by the names of layers out of a model with our adapter.

    Args:
        maker: what copies them, such as ``ControlNetModel.from_unet``.

    Raises:
        PipelineError: one of the parts carries it.
    """
    for part in parts:
        if ADAPTER_NAME in (getattr(part, "peft_config", None) or {}):
            raise PipelineError(
                f"{maker} copies weights by the names of layers, and those of this "
                f"{type(part).__name__} have others while concepts are attached beside them",
                where=maker,
                fix="make it before load_custom, or after unload_custom(); or attach the concepts "
                "with fuse=True, and it begins with them",
            )


def active_adapters(models: Iterable[Any]) -> list[str]:
    """The names of the adapters that are active in any layer of the models, each once."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = [module for model in models for module in model.modules()]
    layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))

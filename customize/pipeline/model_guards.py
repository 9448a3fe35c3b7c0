"""Guards on shared components: methods that would break what is attached refuse to run.

They refuse to merge our adapter, to save a component, and to copy weights by the names of layers.
The guards are on the components themselves, since any pipeline of the same components can call
these methods, and so can the owner of a single component.
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

#: Methods of models, tokenizers and whole pipelines that write them to disk or the hub.
SAVE_METHODS = ("save_pretrained", "push_to_hub")
_COMPONENT_SAVE_METHODS = (*SAVE_METHODS, "save_lora_adapter")

#: Attribute of each changed component with its :class:`customize.pipeline.state.OwnershipTag`.
TAG_ATTRIBUTE = "_customize_tag"


def guard_fusing(model: Any, layers: Iterable[Any]) -> None:
    """Make a model and its layers refuse to merge our adapter into the weights.

    A merged adapter stays in the weights after ``unload_lora_weights``, and cannot be taken out.
    The model refuses before the adapters of other layers are merged; those of text encoders are
    merged layer by layer.

    Args:
        model: Model that carries the adapter.
        layers: peft's LoRA layers that carry the adapter.
    """
    for target, name in ((model, "fuse_lora"), *((layer, "merge") for layer in layers)):
        if hasattr(type(target), name):  # text encoders have no fuse_lora
            # On the object, since `from_pipe` accepts a model of its own class alone.
            method = _refuse_our_adapter(getattr(type(target), name))
            setattr(target, name, MethodType(method, target))


def unguard_fusing(model: Any, layers: Iterable[Any]) -> None:
    """Undo :func:`guard_fusing`, also if someone deleted the adapter."""
    vars(model).pop("fuse_lora", None)
    for layer in layers:
        vars(layer).pop("merge", None)


def _refuse_our_adapter(merge: Any) -> Any:
    @functools.wraps(merge)
    def merge_others(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = inspect.signature(merge).bind(self, *args, **kwargs).arguments
        names = arguments.get("adapter_names")
        if ADAPTER_NAME in (active_adapters([self]) if names is None else names):
            raise PipelineError(
                "fuse_lora would put the attached concepts into the weights, where unload_custom "
                "could not take them out",
                fix="attach them with load_custom(..., fuse=True), or name the adapters to fuse: "
                'fuse_lora(adapter_names=["mine"])',
            )
        return merge(self, *args, **kwargs)

    return merge_others


def guard_saving(component: Any) -> None:
    """Make a component refuse to be saved while its tag has a reason against it.

    A model would write its layers under the names that they have with an adapter. Loading such a
    file leaves these layers with random weights, without an error.

    Args:
        component: Model or tokenizer.
    """
    for name in _COMPONENT_SAVE_METHODS:
        if hasattr(type(component), name):
            setattr(component, name, _GuardedSave(component, name))


def unguard_saving(component: Any) -> None:
    """Undo :func:`guard_saving`."""
    for name in _COMPONENT_SAVE_METHODS:
        vars(component).pop(name, None)


def make_unsaveable_error(reason: str) -> PipelineError:
    """Return the error for a pipeline or component that cannot be saved as it is."""
    return PipelineError(
        reason,
        fix="save without them after unload_custom(), as they have files of their own; or "
        "attach them with fuse=True and save them in the weights, unless they have "
        "embeddings for each layer",
    )


@dataclass(frozen=True, eq=False)
class _GuardedSave:
    """A method that writes a component, after it checked the component's tag.

    It is an object and not a closure, so that copies and pickles of the component check their own
    tag.
    """

    component: Any
    name: str

    @property
    def _method(self) -> Any:
        return getattr(type(self.component), self.name).__get__(self.component)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        # Another adapter of the same model can be saved.
        is_ours = bound.arguments.get("adapter_name", ADAPTER_NAME) == ADAPTER_NAME
        tag = vars(self.component).get(TAG_ATTRIBUTE)
        if is_ours and tag is not None and tag.unsaveable:
            raise make_unsaveable_error(tag.unsaveable)
        return self._method(*args, **kwargs)


def check_copyable(components: Iterable[Any], method: str) -> None:
    """Refuse to copy weights by the names of layers out of a model with our adapter.

    Args:
        components: Models, among other objects.
        method: Name of the method that copies, such as ``ControlNetModel.from_unet``.

    Raises:
        PipelineError: One of the models carries our adapter.
    """
    for component in components:
        if ADAPTER_NAME in (getattr(component, "peft_config", None) or {}):
            raise PipelineError(
                f"{method} copies weights by the names of layers, and those of this "
                f"{type(component).__name__} have others while concepts are attached beside them",
                where=method,
                fix="make it before load_custom, or after unload_custom(); or attach the concepts "
                "with fuse=True, and it begins with them",
            )


def active_adapters(models: Iterable[Any]) -> list[str]:
    """Return the names of the adapters that are active in any layer of the models, each once."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = (module for model in models for module in model.modules())
    names = (
        name
        for module in modules
        if isinstance(module, BaseTunerLayer)
        for name in module.active_adapters
    )
    return list(dict.fromkeys(names))

"""The objects that a call of a pipeline locks: its models, and components that keep state."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from customize.pipeline.call_lock import LockRequest, acquire
from customize.pipeline.modular_blocks import has_block
from customize.pipeline.state import get_state


def iterate_components(pipe: Any) -> Iterator[Any]:
    """Iterate over the attributes of a pipeline, its components among them.

    Models come without torch.compile's wrapper.
    """
    for component in vars(pipe).values():
        yield getattr(component, "_orig_mod", component)


def lock_models(pipe: Any) -> AbstractContextManager[None]:
    """Return a context manager in which no other call uses the models of a pipeline."""

    def request() -> LockRequest:
        state = get_state(pipe)
        detached = state.components.values() if state else ()
        return LockRequest(exclusive=[*_models(iterate_components(pipe)), *detached])

    return acquire(request if hasattr(pipe, "__dict__") else LockRequest)


def lock_tokenizers(pipe: Any) -> AbstractContextManager[None]:
    """Return a context manager in which no other call uses the stock tokenizers of a pipeline."""
    tokenizers = [part for part in iterate_components(pipe) if _is_stock_tokenizer(part)]
    return acquire(lambda: LockRequest(exclusive=tokenizers))


def request_for_call(
    pipe: Any, arguments: Mapping[str, Any], *, customized: bool, exclusive: bool
) -> LockRequest:
    """Return what a call locks, and whether other calls may use the models at the same time.

    Args:
        pipe: The pipeline that is called.
        arguments: The call's arguments, by name.
        customized: Whether concepts or stages act on the call.
        exclusive: Whether a stage needs the models for itself.
    """
    components = list(iterate_components(pipe))
    models = _models(components)
    if not customized:
        return LockRequest(shared=models)
    # Schedulers and guiders advance with each step, and a pipeline keeps notes on itself. Stock
    # tokenizers are set to a length before each text.
    stateful = [
        part
        for part in components
        if (hasattr(part, "from_config") and part not in models) or _is_stock_tokenizer(part)
    ]
    if (
        exclusive
        or _scales_adapters(arguments)
        or has_block(pipe, "changes_models")
        or any(map(_is_hooked, models))
    ):
        return LockRequest(exclusive=[*models, pipe, *stateful])
    return LockRequest(shared=models, exclusive=[pipe, *stateful])


def _models(components: Any) -> list[Any]:
    torch = sys.modules.get("torch")
    if torch is None:
        return []
    return [part for part in components if isinstance(part, torch.nn.Module)]


def _is_stock_tokenizer(component: Any) -> bool:
    """Return whether a component is a tokenizer of a stock class.

    Those that expand triggers lock themselves (:mod:`customize.pipeline.tokenizer_subclass`, which
    imports torch).
    """
    return hasattr(component, "get_added_vocab") and not hasattr(component, "_customize_stock")


def _scales_adapters(arguments: Mapping[str, Any]) -> bool:
    """Return whether diffusers changes the adapters' scales in the models during the call."""
    scales = [
        value.get("scale", 1.0)
        for name, value in arguments.items()
        if name.endswith("attention_kwargs") and isinstance(value, Mapping)
    ]
    return any(scale != 1.0 for scale in scales)


def _is_hooked(model: Any) -> bool:
    """Return whether hooks offload weights or cache outputs, which serves one call at a time."""
    modules = [model]
    while modules:  # `modules()` also makes names and a set, which takes several times as long
        attributes = vars(modules.pop())
        if "_hf_hook" in attributes or getattr(attributes.get("_diffusers_hook"), "hooks", None):
            return True
        modules += [child for child in attributes["_modules"].values() if child is not None]
    return False

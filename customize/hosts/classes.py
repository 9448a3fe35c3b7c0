"""Small subclasses, made for an object's own class, that change what one of its methods does.

They carry the class's own name and module, so that ``isinstance``, ``from_pipe``, signatures and
saved files, which name classes, are what they were.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from customize.concepts.tokens import expand

Triggers = dict[str, list[str]]


def expand_triggers(tokenizer: Any, triggers: Triggers) -> None:
    """Make a tokenizer replace triggers by their vocabulary entries in all text it is called on.

    The tokenizer and not the pipeline's ``encode_prompt`` does it, because a tokenizer is shared
    by all pipelines that are made from the same components, and because this comes after
    diffusers' own ``maybe_convert_prompt``, which would expand an expanded prompt again.

    Args:
        triggers: trigger -> entries; none gives the tokenizer its own class back.
    """
    if triggers:
        stock: Any = _stock(type(tokenizer))
        tokenizer.__class__ = _expanding(stock)
        tokenizer._customize_triggers = triggers
    elif hasattr(type(tokenizer), "_customize_stock"):
        tokenizer.__class__ = _stock(type(tokenizer))
        del tokenizer._customize_triggers


def guard_saving(pipe: Any, on: bool) -> None:
    """Let ``save_pretrained`` refuse while it would write wrapped, unloadable models."""
    cls: Any = type(pipe)
    if on != hasattr(cls, "_customize_stock"):
        pipe.__class__ = _guarded(cls) if on else _stock(cls)


@functools.cache
def _expanding(stock: Any) -> type:
    call = stock.__call__

    @functools.wraps(call)
    def expanding(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        return call(self, _expanded(text, self._customize_triggers), *args, **kwargs)

    return _subclass(stock, {"__call__": expanding}, _expanding)


@functools.cache
def _guarded(stock: Any) -> type:
    save = stock.save_pretrained

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        from customize.hosts.load import check_saveable

        check_saveable(self)
        return save(self, *args, **kwargs)

    return _subclass(stock, {"save_pretrained": save_pretrained}, _guarded)


def _subclass(stock: Any, methods: Mapping[str, Any], make: Callable[[type], type]) -> type:
    def reduce(self: Any, protocol: Any) -> Any:
        # Pickling looks a class up by its name, which would find the stock one.
        _, (_, *arguments), *rest = stock.__reduce_ex__(self, protocol)
        return _rebuilt, (make, stock, *arguments), *rest

    names = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "__reduce_ex__": reduce,
        "_customize_stock": stock,
    }
    return type(stock)(stock.__name__, (stock,), {**names, **methods})


def _rebuilt(make: Callable[[type], Any], stock: type, *arguments: Any) -> Any:
    made = make(stock)
    return made.__new__(made, *arguments)


def _stock(cls: Any) -> Any:
    return getattr(cls, "_customize_stock", cls)


def _expanded(text: Any, triggers: Triggers) -> Any:
    if isinstance(text, str):
        return expand(text, triggers)
    if isinstance(text, Sequence):  # a batch, or words split by the caller
        return [_expanded(each, triggers) for each in text]
    return text

"""Tokenizers that replace triggers: small subclasses, made for a tokenizer's own class.

They carry the class's own name and module, so that ``isinstance``, ``from_pipe``, signatures and
saved files, which name classes, are what they were.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from customize.concepts.tokens.layerwise_embeddings import contains_trigger, expand_for_layer
from customize.concepts.tokens.token_rows import expand_prompt

Triggers = dict[str, list[str]]

_ENCODING = threading.RLock()


def expand_triggers(
    tokenizer: Any,
    triggers: Triggers,
    layered: Sequence[str] = (),
    layers: int = 0,
) -> None:
    """Make a tokenizer replace triggers by their vocabulary entries in all text it is called on.

    The tokenizer and not the pipeline's ``encode_prompt`` does it, because a tokenizer is shared
    by all pipelines that are made from the same components, and because this comes after
    diffusers' own ``maybe_convert_prompt``, which would expand an expanded prompt again.

    Args:
        triggers: trigger -> entries; none gives the tokenizer its own class back.
        layered: those of them that have entries for each of the cross-attention ``layers``. Whoever
            asks as pipelines do, for ids padded to the full length, gets (batch, layers * length)
            where one is in the text: see :mod:`customize.concepts.tokens.layerwise_embeddings`.
    """
    if triggers:
        stock: Any = _stock(type(tokenizer))
        tokenizer.__class__ = _expanding(stock)
        tokenizer._customize_triggers = triggers
        tokenizer._customize_layered = (tuple(layered), layers)
    elif hasattr(type(tokenizer), "_customize_stock"):
        tokenizer.__class__ = _stock(type(tokenizer))
        for name in ("triggers", "layered"):
            delattr(tokenizer, f"_customize_{name}")


@functools.cache
def _expanding(stock: Any) -> type:
    call = stock.__call__

    @functools.wraps(call)
    def expanding(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        text = _expanded(text, self)
        if _asks_for_layers(self, text, kwargs):
            return _by_layer(functools.partial(call, self), text, kwargs, self)
        return call(self, text, *args, **kwargs)

    encode = stock.encode

    @functools.wraps(encode)
    def expanding_encode(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        return encode(self, _expanded(text, self), *args, **kwargs)

    methods: dict[str, Any] = {"__call__": expanding, "encode": expanding_encode}
    for name in ("_encode_plus", "_batch_encode_plus"):  # which all ways to tokenize lead to
        if hasattr(stock, name):
            methods[name] = _one_at_a_time(getattr(stock, name))
    return _subclass(stock, methods, _expanding)


def _one_at_a_time(encode: Any) -> Any:
    """Of tokenizers in Rust, which are set to a length and a padding before they encode, so that
    one thread would get the length of another's."""

    @functools.wraps(encode)
    def encode_alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _ENCODING:
            return encode(self, *args, **kwargs)

    return encode_alone


def _asks_for_layers(tokenizer: Any, text: Any, kwargs: Mapping[str, Any]) -> bool:
    layered, layers = tokenizer._customize_layered
    padded = kwargs.get("padding") == "max_length" and kwargs.get("return_tensors") == "pt"
    if not layered or not padded:
        return False
    # Pipelines ask for a negative prompt of the length that the prompt came out with.
    asked, length = kwargs.get("max_length"), tokenizer.model_max_length
    texts = [text] if isinstance(text, str) else text
    return asked == layers * length or (
        asked == length and any(contains_trigger(each, layered) for each in texts)
    )


def _by_layer(call: Any, text: Any, kwargs: Mapping[str, Any], tokenizer: Any) -> Any:
    layered, layers = tokenizer._customize_layered
    texts = [text] if isinstance(text, str) else text
    known = tokenizer.get_added_vocab()
    wordings = [
        expand_for_layer(each, layered, layer, known) for each in texts for layer in range(layers)
    ]
    found = call(wordings, **{**kwargs, "max_length": tokenizer.model_max_length})
    for key, values in found.items():
        found[key] = values.reshape(len(texts), -1)
    return found


def _subclass(stock: Any, methods: Mapping[str, Any], make: Callable[[type], type]) -> type:
    """A class that passes for ``stock`` and has other methods.

    Args:
        make: what makes this class from ``stock``, for unpickling.
    """

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
    """The class that :func:`_subclass` was given; any other class as it is."""
    return getattr(cls, "_customize_stock", cls)


def _expanded(text: Any, tokenizer: Any) -> Any:
    if isinstance(text, str):
        return expand_prompt(text, tokenizer._customize_triggers, tokenizer.get_added_vocab())
    if isinstance(text, Sequence):  # a batch, or words split by the caller
        return [_expanded(each, tokenizer) for each in text]
    return text

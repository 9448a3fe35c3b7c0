"""Tokenizers that expand triggers: small subclasses, made of a tokenizer's own class.

They have the name and module of that class, so that ``isinstance``, ``from_pipe``, signatures and
saved files, which name classes, are unaffected.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from customize.concepts.tokens.layerwise_embeddings import contains_trigger, expand_for_layer
from customize.concepts.tokens.token_rows import expand_prompt

_ENCODING = threading.RLock()


@dataclass(frozen=True)
class _TriggerTable:
    """The attribute ``_customize_triggers`` of a tokenizer.

    Attributes:
        entries: Trigger -> vocabulary entries that replace it.
        layered: Triggers with an entry for each cross-attention layer.
        layers: Number of these layers.
    """

    entries: Mapping[str, list[str]]
    layered: tuple[str, ...]
    layers: int


def expand_triggers(
    tokenizer: Any,
    triggers: Mapping[str, list[str]],
    layered: Sequence[str] = (),
    layers: int = 0,
) -> None:
    """Make a tokenizer replace triggers by their vocabulary entries in all text.

    The tokenizer does it and not the pipeline's ``encode_prompt``, because all pipelines of the
    same components share the tokenizer, and because it runs after diffusers'
    ``maybe_convert_prompt``, which would expand an expanded prompt again.

    Args:
        tokenizer: Tokenizer to change in place.
        triggers: Trigger -> vocabulary entries. If empty, the tokenizer gets its own class back.
        layered: Triggers with entries for each of the cross-attention ``layers``. If one of them
            is in a text, ids padded to the full length, as pipelines request them, come as
            (batch, layers * length): see :mod:`customize.concepts.tokens.layerwise_embeddings`.
        layers: Number of cross-attention layers.
    """
    stock: Any = getattr(type(tokenizer), "_customize_stock", type(tokenizer))
    if triggers:
        tokenizer.__class__ = _expanding_class(stock)
        tokenizer._customize_triggers = _TriggerTable(triggers, tuple(layered), layers)
    elif stock is not type(tokenizer):
        tokenizer.__class__ = stock
        del tokenizer._customize_triggers


@functools.cache
def _expanding_class(stock: Any) -> type:
    """Return a subclass of ``stock``, with its name, that expands triggers."""

    @functools.wraps(stock.__call__)
    def call(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        text = _expand(text, self)
        if _requests_layers(self, text, kwargs):
            return _tokenize_by_layer(stock, self, text, kwargs)
        return stock.__call__(self, text, *args, **kwargs)

    @functools.wraps(stock.encode)
    def encode(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        return stock.encode(self, _expand(text, self), *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        # Pickle looks a class up by its name, which would find the stock one.
        _, (_, *arguments), *state = stock.__reduce_ex__(self, protocol)
        return _unpickle, (stock, *arguments), *state

    attributes: dict[str, Any] = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "__reduce_ex__": reduce,
        "__call__": call,
        "encode": encode,
        "_customize_stock": stock,
    }
    for name in ("_encode_plus", "_batch_encode_plus"):  # every way to tokenize calls one of them
        if hasattr(stock, name):
            attributes[name] = _locked(getattr(stock, name))
    return type(stock)(stock.__name__, (stock,), attributes)


def _unpickle(stock: type, *arguments: Any) -> Any:
    expanding: Any = _expanding_class(stock)
    return expanding.__new__(expanding, *arguments)


def _locked(encode: Any) -> Any:
    """Wrap a method that sets a tokenizer in Rust to a length and a padding before it encodes.

    Without the lock a thread would get the length that another one set.
    """

    @functools.wraps(encode)
    def encode_locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _ENCODING:
            return encode(self, *args, **kwargs)

    return encode_locked


def expand_text(text: str, tokenizer: Any) -> str:
    """Return a text as a tokenizer reads it, with its triggers expanded."""
    return str(_expand(text, tokenizer)) if hasattr(tokenizer, "_customize_triggers") else text


def _expand(text: Any, tokenizer: Any) -> Any:
    if isinstance(text, str):
        entries = tokenizer._customize_triggers.entries
        return expand_prompt(text, entries, tokenizer.get_added_vocab())
    if isinstance(text, Sequence):  # a batch, or words that the caller split
        return [_expand(part, tokenizer) for part in text]
    return text


def _requests_layers(tokenizer: Any, text: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether ids for each layer are to be returned, as to a pipeline."""
    table = tokenizer._customize_triggers
    is_padded = kwargs.get("padding") == "max_length" and kwargs.get("return_tensors") == "pt"
    if not table.layered or not is_padded:
        return False
    # Pipelines request a negative prompt of the length that the prompt came out with.
    requested, length = kwargs.get("max_length"), tokenizer.model_max_length
    texts = [text] if isinstance(text, str) else text
    return requested == table.layers * length or (
        requested == length and any(contains_trigger(part, table.layered) for part in texts)
    )


def _tokenize_by_layer(stock: Any, tokenizer: Any, text: Any, kwargs: Mapping[str, Any]) -> Any:
    table = tokenizer._customize_triggers
    texts = [text] if isinstance(text, str) else text
    vocabulary = tokenizer.get_added_vocab()
    expanded = [
        expand_for_layer(part, table.layered, layer, vocabulary)
        for part in texts
        for layer in range(table.layers)
    ]
    length = tokenizer.model_max_length
    encoded = stock.__call__(tokenizer, expanded, **{**kwargs, "max_length": length})
    for key, values in encoded.items():
        encoded[key] = values.reshape(len(texts), -1)
    return encoded

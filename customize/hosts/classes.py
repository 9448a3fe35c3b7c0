"""Small subclasses, made for an object's own class, that change what one of its methods does.

They carry the class's own name and module, so that ``isinstance``, ``from_pipe``, signatures and
saved files, which name classes, are what they were.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

from torch import Tensor

from customize.concepts.layerwise import mentions, wording
from customize.concepts.tokens import expand
from customize.families.components import uncompiled
from customize.hosts.calling import Stage, staged

Triggers = dict[str, list[str]]

_ADJUSTED: WeakSet[Any] = WeakSet()


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
            where one is in the text: see :mod:`customize.concepts.layerwise`.
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


def adjust_pipelines(
    pipe: Any, denoiser: Any, *, on: bool, layered: bool, stages: tuple[Stage, ...]
) -> None:
    """Let a pipeline's calls go through the stages.

    Args:
        pipe: where this begins; it ends on all adjusted pipelines of the same denoiser. Another one
            of the same components has no stages until ``load_custom`` is called on it.
        on: whether anything is attached.
        layered: whether tokens with an embedding for each layer are. Then ``encode_prompt`` gives
            prompt and negative prompt conditions of one length, which differ where one of the two
            is worded for each layer. Another pipeline needs the trigger in its negative prompt.
    """
    if on:
        pipe.__class__ = _adjusted(_stock(type(pipe)), layered, stages)
        _ADJUSTED.add(pipe)
    else:
        for each in list(_ADJUSTED):
            parts = map(uncompiled, each.components.values())
            if each is pipe or any(part is denoiser for part in parts):
                each.__class__ = _stock(type(each))
                _ADJUSTED.discard(each)


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

    return _subclass(stock, {"__call__": expanding, "encode": expanding_encode}, _expanding)


@functools.cache
def _adjusted(stock: Any, layered: bool, stages: tuple[Stage, ...]) -> type:
    methods = {"__call__": staged(stock.__call__, stages)}
    if layered and hasattr(stock, "encode_prompt"):  # modular pipelines have it in their blocks
        encode = stock.encode_prompt

        @functools.wraps(encode)
        def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _of_one_length(encode(self, *args, **kwargs))

        methods["encode_prompt"] = encode_prompt
    return _subclass(stock, methods, functools.partial(_adjusted, layered=layered, stages=stages))


def _asks_for_layers(tokenizer: Any, text: Any, kwargs: Mapping[str, Any]) -> bool:
    layered, layers = tokenizer._customize_layered
    padded = kwargs.get("padding") == "max_length" and kwargs.get("return_tensors") == "pt"
    if not layered or not padded:
        return False
    # Pipelines ask for a negative prompt of the length that the prompt came out with.
    asked, length = kwargs.get("max_length"), tokenizer.model_max_length
    texts = [text] if isinstance(text, str) else text
    return asked == layers * length or (
        asked == length and any(mentions(each, layered) for each in texts)
    )


def _by_layer(call: Any, text: Any, kwargs: Mapping[str, Any], tokenizer: Any) -> Any:
    layered, layers = tokenizer._customize_layered
    texts = [text] if isinstance(text, str) else text
    known = tokenizer.get_added_vocab()
    wordings = [wording(each, layered, layer, known) for each in texts for layer in range(layers)]
    found = call(wordings, **{**kwargs, "max_length": tokenizer.model_max_length})
    for key, values in found.items():
        found[key] = values.reshape(len(texts), -1)
    return found


def _of_one_length(found: Any) -> Any:
    """Of two (batch, sequence, width), the shorter one repeated for each layer."""
    pair = isinstance(found, tuple) and len(found) == 2
    if not pair or not all(isinstance(each, Tensor) and each.ndim == 3 for each in found):
        return found
    longest = max(each.shape[1] for each in found)
    return tuple(
        each if each.shape[1] == longest else each.repeat(1, longest // each.shape[1], 1)
        for each in found
    )


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
    copy = made.__new__(made, *arguments)
    if isinstance(make, functools.partial):  # a pipeline's
        _ADJUSTED.add(copy)
    return copy


def _stock(cls: Any) -> Any:
    """The class that :func:`_subclass` was given; any other class as it is."""
    return getattr(cls, "_customize_stock", cls)


def _expanded(text: Any, tokenizer: Any) -> Any:
    if isinstance(text, str):
        return expand(text, tokenizer._customize_triggers, tokenizer.get_added_vocab())
    if isinstance(text, Sequence):  # a batch, or words split by the caller
        return [_expanded(each, tokenizer) for each in text]
    return text

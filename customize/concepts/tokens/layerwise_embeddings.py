"""Tokens with one embedding for each cross-attention layer (P+, arXiv 2303.09522).

A prompt is worded once for each layer, with that layer's own vocabulary entries, and every layer
reads the prompt as its wording was encoded. What belongs to the layers lies one after another in
the sequence: ids are (batch, layers * length), conditions (batch, layers * length, width). Only
such lengths are acted on; whatever has the ordinary length passes untouched. A model beside the
denoiser that reads the same conditions, such as a ControlNet, sees the sequences of all layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from customize.concepts.tokens.token_rows import tokens_containing, vocabulary_entries
from customize.families.family import Family
from customize.families.pipeline_components import uncompiled


def layer_vocabulary_entries(trigger: str, num_tokens: int, layers: int) -> list[str]:
    """The vocabulary entries of every layer: ``["<rex@0>", "<rex@0>_1", "<rex@1>", ...]``."""
    return [
        name
        for i in range(layers)
        for name in vocabulary_entries(_of_layer(trigger, i), num_tokens)
    ]


def expand_for_layer(
    text: str, triggers: Iterable[str], layer: int, others: Iterable[str] = ()
) -> str:
    """An expanded prompt with the vocabulary entries of one layer.

    Args:
        text: as :func:`customize.concepts.tokens.token_rows.expand_prompt` gives it.
        triggers: those that have entries for each layer.
        others: as for ``expand_prompt``.
    """
    named = {trigger.lower(): _of_layer(trigger, layer) for trigger in triggers}
    pattern = "|".join(map(re.escape, (*tokens_containing(named, others), *named)))
    return re.sub(
        pattern, lambda m: named.get(m.group().lower(), m.group()), text, flags=re.IGNORECASE
    )


def contains_trigger(text: str, triggers: Iterable[str]) -> bool:
    """Whether a prompt calls any of the triggers."""
    return any(trigger.lower() in text.lower() for trigger in triggers)


def mean_rows(rows: Tensor) -> Tensor:
    """What stands for a concept where layers cannot be told apart.

    Args:
        rows: (n, layers, width), or (n, width), which stays as it is.

    Returns:
        (n, width), in the dtype of rows.
    """
    return rows if rows.ndim == 2 else rows.float().mean(1).to(rows.dtype)


def vocabulary_rows(trigger: str, rows: Tensor) -> tuple[list[str], Tensor]:
    """All that a concept adds to a dictionary.

    With layers, the plain entries come first, with the mean over the layers.

    Args:
        rows: (n, width) or (n, layers, width).

    Returns:
        The entries, and their rows: (entries, width).
    """
    names, plain = vocabulary_entries(trigger, rows.shape[0]), mean_rows(rows)
    if rows.ndim == 2:
        return names, plain
    own = layer_vocabulary_entries(trigger, *rows.shape[:2])
    return names + own, torch.cat([plain, rows.transpose(0, 1).flatten(0, 1)])


def layers_with_embeddings(family: Family) -> list[str]:
    """The layers that tokens can have embeddings for, in the order of those.

    Empty where picture and prompt share one attention, or where more than the sequence of one text
    encoder is read, such as a pooled prompt: that is no layer's own.
    """
    return family.cross_attention_layers() if len(family.clip_encoders) == 1 else []


def hook_cross_attention(family: Family) -> list[Any]:
    """Let each cross-attention layer of the denoiser read its own part of the conditions.

    Returns:
        The hooks' handles, each with ``remove()``.
    """
    denoiser, layers = uncompiled(family.denoiser), layers_with_embeddings(family)
    length = _length(family)
    return [
        denoiser.get_submodule(name).register_forward_pre_hook(
            partial(_own_part, index, len(layers), length), with_kwargs=True
        )
        for index, name in enumerate(layers)
    ]


def hook_text_encoder(family: Family) -> list[Any]:
    """Let the text encoder take ids of (batch, layers * length), whoever calls them.

    Returns:
        The hooks' handles, each with ``remove()``.
    """
    whole = len(layers_with_embeddings(family)) * _length(family)
    (model,) = family.text_encoders.values()
    encoder, folded = uncompiled(model), partial(_folded, whole, _length(family))
    return [
        encoder.register_forward_pre_hook(folded, with_kwargs=True),
        encoder.register_forward_hook(_joined, with_kwargs=True),
    ]


def match_lengths(found: Any) -> Any:
    """What ``encode_prompt`` gives, its conditions all as long as the longest.

    Args:
        found: of two (batch, sequence, width) the shorter one is repeated for each layer; all else
            stays as it is.
    """
    pair = isinstance(found, tuple) and len(found) == 2
    if not pair or not all(isinstance(each, Tensor) and each.ndim == 3 for each in found):
        return found
    longest = max(each.shape[1] for each in found)
    return tuple(
        each if each.shape[1] == longest else each.repeat(1, longest // each.shape[1], 1)
        for each in found
    )


def _own_part(
    index: int, layers: int, length: int, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    given = kwargs.get("encoder_hidden_states")
    # The images of an IP-Adapter ride beside the text.
    text = given[0] if isinstance(given, tuple) else given
    if text is None or text.shape[1] != layers * length:
        return None
    # Contiguous, so that the same kernels run as on a sequence of its own.
    own = text[:, index * length : (index + 1) * length].contiguous()
    return args, kwargs | {
        "encoder_hidden_states": (own, *given[1:]) if isinstance(given, tuple) else own
    }


def _folded(
    whole: int, length: int, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """(batch, layers * length) ids to (batch, layers, length), which CLIP flattens by itself."""
    ids = _ids(args, kwargs)
    if ids.ndim != 2 or ids.shape[1] != whole:
        return None
    ids = ids.unflatten(1, (-1, length))
    mask = kwargs.get("attention_mask")
    if mask is not None:
        kwargs = kwargs | {"attention_mask": mask.reshape(-1, length)}
    return ((ids, *args[1:]), kwargs) if args else (args, kwargs | {"input_ids": ids})


def _joined(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """What was encoded from folded ids, back to (batch, layers * length, width)."""
    ids = _ids(args, kwargs)
    if ids.ndim != 3:
        return None

    def joined(value: Any) -> Any:
        if isinstance(value, tuple):  # the hidden states of all layers of the encoder
            return tuple(map(joined, value))
        sequence = isinstance(value, Tensor) and value.ndim == 3
        return value.reshape(ids.shape[0], -1, value.shape[-1]) if sequence else value

    if isinstance(output, tuple):
        return joined(output)
    return type(output)(**{key: joined(value) for key, value in output.items()})


def _ids(args: Any, kwargs: dict[str, Any]) -> Tensor:
    ids: Tensor = args[0] if args else kwargs["input_ids"]
    return ids


def _length(family: Family) -> int:
    length: int = family.token_dictionaries()[0].tokenizer.model_max_length
    return length


def _of_layer(trigger: str, layer: int) -> str:
    # No trigger of a concept has this sign.
    return f"{trigger[:-1]}@{layer}>"

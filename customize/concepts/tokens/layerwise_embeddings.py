"""Tokens with a separate embedding for each cross-attention layer (P+, arXiv 2303.09522).

The prompt is expanded once per layer, with the vocabulary entries of that layer, and each layer
reads its own encoding. The layers' sequences are concatenated: ids are (batch, layers * length),
conditions (batch, layers * length, width). Sequences of the ordinary length pass unchanged. Other
models that read the conditions, such as a ControlNet, get the sequences of all layers.
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
    """The vocabulary entries of all layers: ``["<rex@0>", "<rex@0>_1", "<rex@1>", ...]``."""
    return [
        name
        for i in range(layers)
        for name in vocabulary_entries(_layer_trigger(trigger, i), num_tokens)
    ]


def expand_for_layer(
    text: str, triggers: Iterable[str], layer: int, others: Iterable[str] = ()
) -> str:
    """Replace the vocabulary entries in an expanded prompt by those of one layer.

    Args:
        text: Result of :func:`customize.concepts.tokens.token_rows.expand_prompt`.
        triggers: The triggers with entries for each layer.
        layer: Index of the layer.
        others: As ``other_tokens`` of ``expand_prompt``.
    """
    replacements = {trigger.lower(): _layer_trigger(trigger, layer) for trigger in triggers}
    pattern = "|".join(map(re.escape, (*tokens_containing(replacements, others), *replacements)))

    def replaced(match: re.Match[str]) -> str:
        return replacements.get(match.group().lower(), match.group())

    return re.sub(pattern, replaced, text, flags=re.IGNORECASE)


def contains_trigger(text: str, triggers: Iterable[str]) -> bool:
    """Whether a prompt contains any of the triggers."""
    return any(trigger.lower() in text.lower() for trigger in triggers)


def mean_rows(rows: Tensor) -> Tensor:
    """The mean of embeddings over the layers.

    Args:
        rows: (n, layers, width), or (n, width), which is returned unchanged.

    Returns:
        (n, width), in the dtype of rows.
    """
    return rows if rows.ndim == 2 else rows.float().mean(1).to(rows.dtype)


def vocabulary_rows(trigger: str, rows: Tensor) -> tuple[list[str], Tensor]:
    """All vocabulary entries of a trigger, and their rows.

    With layers, the plain entries come first, with the mean over the layers.

    Args:
        trigger: The trigger.
        rows: (n, width) or (n, layers, width).

    Returns:
        The entries, and their rows (entries, width).
    """
    names, means = vocabulary_entries(trigger, rows.shape[0]), mean_rows(rows)
    if rows.ndim == 2:
        return names, means
    layer_names = layer_vocabulary_entries(trigger, *rows.shape[:2])
    return names + layer_names, torch.cat([means, rows.transpose(0, 1).flatten(0, 1)])


def layers_with_embeddings(family: Family) -> list[str]:
    """The cross-attention layers that tokens can have separate embeddings for, in order.

    Empty for models in which picture and prompt share one attention, and for those with several
    CLIP encoders: their conditions do not belong to single layers.
    """
    return family.cross_attention_layers() if len(family.clip_encoders) == 1 else []


def hook_cross_attention(family: Family) -> list[Any]:
    """Register hooks that give each cross-attention layer its part of the conditions.

    Returns:
        The hooks' handles, with ``remove()``.
    """
    denoiser, layers = uncompiled(family.denoiser), layers_with_embeddings(family)
    length = _length(family)
    return [
        denoiser.get_submodule(name).register_forward_pre_hook(
            partial(_select_part, index, len(layers), length), with_kwargs=True
        )
        for index, name in enumerate(layers)
    ]


def hook_text_encoder(family: Family) -> list[Any]:
    """Register hooks by which the text encoder accepts ids of (batch, layers * length).

    Returns:
        The hooks' handles, with ``remove()``.
    """
    whole = len(layers_with_embeddings(family)) * _length(family)
    (model,) = family.text_encoders.values()
    encoder, fold = uncompiled(model), partial(_fold_ids, whole, _length(family))
    return [
        encoder.register_forward_pre_hook(fold, with_kwargs=True),
        encoder.register_forward_hook(_unfold_output, with_kwargs=True),
    ]


def match_lengths(encoded: Any) -> Any:
    """Repeat the shorter of two conditions, for each layer, to the length of the longer one.

    Args:
        encoded: Result of ``encode_prompt``; anything but two (batch, sequence, width) tensors is
            returned unchanged.
    """
    is_pair = isinstance(encoded, tuple) and len(encoded) == 2
    if not is_pair or not all(isinstance(t, Tensor) and t.ndim == 3 for t in encoded):
        return encoded
    longest = max(tensor.shape[1] for tensor in encoded)
    return tuple(
        tensor if tensor.shape[1] == longest else tensor.repeat(1, longest // tensor.shape[1], 1)
        for tensor in encoded
    )


def _select_part(
    index: int, layers: int, length: int, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    states = kwargs.get("encoder_hidden_states")
    # With an IP-Adapter, its image embeddings follow the text.
    text = states[0] if isinstance(states, tuple) else states
    if text is None or text.shape[1] != layers * length:
        return None
    # Contiguous, so that the same kernels run as for an ordinary sequence.
    part = text[:, index * length : (index + 1) * length].contiguous()
    return args, kwargs | {
        "encoder_hidden_states": (part, *states[1:]) if isinstance(states, tuple) else part
    }


def _fold_ids(
    whole: int, length: int, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """Fold ids of (batch, layers * length) to (batch, layers, length), which CLIP flattens."""
    ids = _ids(args, kwargs)
    if ids.ndim != 2 or ids.shape[1] != whole:
        return None
    ids = ids.unflatten(1, (-1, length))
    mask = kwargs.get("attention_mask")
    if mask is not None:
        kwargs = kwargs | {"attention_mask": mask.reshape(-1, length)}
    return ((ids, *args[1:]), kwargs) if args else (args, kwargs | {"input_ids": ids})


def _unfold_output(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Reshape the encoding of folded ids to (batch, layers * length, width)."""
    ids = _ids(args, kwargs)
    if ids.ndim != 3:
        return None

    def unfold(value: Any) -> Any:
        if isinstance(value, tuple):  # hidden states of the encoder's layers
            return tuple(map(unfold, value))
        is_sequence = isinstance(value, Tensor) and value.ndim == 3
        return value.reshape(ids.shape[0], -1, value.shape[-1]) if is_sequence else value

    if isinstance(output, tuple):
        return unfold(output)
    return type(output)(**{key: unfold(value) for key, value in output.items()})


def _ids(args: Any, kwargs: dict[str, Any]) -> Tensor:
    ids: Tensor = args[0] if args else kwargs["input_ids"]
    return ids


def _length(family: Family) -> int:
    length: int = family.token_dictionaries()[0].tokenizer.model_max_length
    return length


def _layer_trigger(trigger: str, layer: int) -> str:
    # A concept's trigger does not contain "@".
    return f"{trigger[:-1]}@{layer}>"

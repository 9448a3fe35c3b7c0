"""What positions of the picture attend to, computed from the queries and keys of an attention."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from customize.core.routing import attention_to_tokens
from customize.families import Family
from customize.families.token_layout import TextAttention, rotate
from customize.stages.routed_call import RoutedCall


def attended_tokens(
    family: Family,
    call: RoutedCall,
    attention: TextAttention,
    module: Any,
    kwargs: dict[str, Any],
    query: Tensor,
    key: Tensor,
) -> Tensor:
    """Return what positions of the picture attend to, of the text.

    The attention's other keys, those of the picture, are left out.

    Args:
        family: The models of the pipeline.
        call: The running call.
        attention: The attention.
        module: Its module.
        kwargs: The module's arguments, for rotary embeddings.
        query: (entries, positions, heads * width), the output of its query projection.
        key: (entries, tokens, heads * width), that of its key projection.

    Returns:
        (routed rows, positions, tokens), float32; each position's sum is 1.
    """
    heads = getattr(module, "heads", None) or module.num_heads
    query = _normed(query, heads, getattr(module, "norm_q", None))
    norm = "norm_added_k" if attention.key.startswith("add_") else "norm_k"
    key_heads = getattr(module, "num_kv_heads", heads)
    key = _normed(key, key_heads, getattr(module, norm, None))
    key = key.repeat_interleave(heads // key_heads, 2)
    if attention.tokens != "picture":
        picture, text = family.token_offsets(attention.tokens, call.texts, call.grid)
        query = query[:, picture : picture + math.prod(call.grid)]
        key = key[:, text : text + call.texts]
    of_picture, of_text = family.rotations(kwargs, call.texts, call.grid)
    query, key = rotate(query, of_picture), rotate(key, of_text)
    valid = call.valid
    rows = list(call.pictures)
    per_row = len(query) // call.batch
    if per_row > 1:  # frames
        rows = [row * per_row + frame for row in rows for frame in range(per_row)]
        valid = None if valid is None else valid.repeat_interleave(per_row, 0)
    attended = attention_to_tokens(
        query[rows].flatten(2),
        key[rows].flatten(2),
        heads,
        query.shape[-1] ** -0.5,
        None if valid is None else valid[rows].bool(),
    )
    return attended.unflatten(0, (-1, per_row)).flatten(1, 2)


def _normed(states: Tensor, heads: int, norm: Any) -> Tensor:
    """Return queries or keys as (batch, tokens, heads, width), float32, with the layer's norm.

    Args:
        states: (batch, tokens, heads * width).
        heads: Their number.
        norm: The layer's norm of a head or of all heads; None for none.
    """
    if norm is not None and norm.weight.numel() == states.shape[-1]:
        states = norm(states)
    split = states.unflatten(-1, (heads, -1))
    if norm is not None and norm.weight.numel() != states.shape[-1]:
        split = norm(split)
    return split.float()

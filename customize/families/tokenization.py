"""Prompts on their way to the text encoders, and back as tensors of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> Any:
    """Tokens as the pipelines make them: ``input_ids`` (len(prompts), length), padded and cut."""
    return tokenizer(
        list(prompts),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    )


def pad_sequences(rows: Sequence[Tensor]) -> Tensor:
    """Rows of different lengths as one tensor, with zeros behind the shorter ones.

    Args:
        rows: each (length, ...), or all single numbers.

    Returns:
        (len(rows), longest, ...).
    """
    if not rows[0].ndim:
        return torch.stack(list(rows))
    longest = max(len(row) for row in rows)
    return torch.stack(
        [torch.cat([row, row.new_zeros(longest - len(row), *row.shape[1:])]) for row in rows]
    )


def to_device(ids: Tensor, device: torch.device) -> Tensor:
    """Ids from the CPU on the encoder's device; without waiting for all that runs there, as
    copying from ordinary memory to a GPU would: prompts may be encoded at every training step."""
    if device.type == "cuda":
        return ids.pin_memory().to(device, non_blocking=True)
    return ids.to(device)


def unpad_sequences(states: Tensor, mask: Tensor) -> list[Tensor]:
    """The states of each prompt's own tokens: (length, width) each.

    Args:
        states: (batch, longest, width), on any device.
        mask: (batch, longest), where the tokenizer made it: of one on the device the lengths would
            have to be waited for.
    """
    return [
        row[to_device(own.nonzero()[:, 0], states.device)]
        for row, own in zip(states, mask, strict=True)
    ]

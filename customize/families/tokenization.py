"""Tokenization of prompts, and padding of the encoded sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> Any:
    """Tokenize prompts as the pipelines do, padded and truncated to one length.

    Args:
        tokenizer: Of a text encoder.
        prompts: Texts.
        length: Number of tokens of each prompt.

    Returns:
        The tokenizer's output; ``input_ids`` is (len(prompts), length), int64.
    """
    return tokenizer(
        list(prompts),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    )


def pad_sequences(rows: Sequence[Tensor]) -> Tensor:
    """Stack rows of different lengths, padded at the end with zeros.

    Args:
        rows: (length, ...) each, or scalars.

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
    """Copy ids from the CPU to the encoder's device without synchronizing with it.

    Pinned memory makes the copy asynchronous: prompts may be encoded at every training step.
    """
    if device.type == "cuda":
        return ids.pin_memory().to(device, non_blocking=True)
    return ids.to(device)


def unpad_sequences(states: Tensor, mask: Tensor) -> list[Tensor]:
    """Return the states of each prompt without padding: (length, width) each.

    Args:
        states: (batch, longest, width), on any device.
        mask: (batch, longest), on the CPU: a mask on the device would require synchronization.
    """
    return [
        row[to_device(row_mask.nonzero()[:, 0], states.device)]
        for row, row_mask in zip(states, mask, strict=True)
    ]

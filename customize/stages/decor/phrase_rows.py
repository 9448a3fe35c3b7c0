"""The rows of phrases in encoded texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from customize.stages.decor.text_encoder import phrase_too_long


def count_tokens(tokenizer: Any, text: str) -> int:
    """Return the number of a text's tokens, without those of begin and end."""
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def mean_phrase_rows(
    phrase: str, prefixes: Sequence[str], encoded: Mapping[str, Tensor], tokenizer: Any
) -> Tensor:
    """Return the rows of a phrase's tokens, in the mean over the texts that end with it.

    The embedding of a word depends on the words before it.

    Args:
        phrase: The phrase.
        prefixes: What precedes it in the texts; the first one is empty.
        encoded: prefix + phrase -> (length, width), with a token of begin.
        tokenizer: Of the text encoder.

    Returns:
        (tokens of the phrase, width). Texts that exceed the text encoder's length are left out.

    Raises:
        ConfigError: The phrase has more tokens than the text encoder reads.
    """
    limit = tokenizer.model_max_length - 2  # without begin and end of text
    count = count_tokens(tokenizer, phrase)
    if count > limit:
        raise phrase_too_long(phrase, limit)
    rows = []
    for prefix in prefixes:
        stop = 1 + count_tokens(tokenizer, prefix + phrase)
        if stop <= 1 + limit:
            rows.append(encoded[prefix + phrase][stop - count : stop])
    return torch.stack(rows).mean(0)

"""The number of tokens that a text encoder reads of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from customize.concepts.tokens.prompt_phrases import is_truncated


@dataclass(frozen=True)
class TokenLimit:
    """What a text encoder reads of a prompt.

    Attributes:
        encoder: Component name of the text encoder.
        tokenizer: Its tokenizer.
        tokens: Number of tokens that it reads, special tokens included; None if unknown.
    """

    encoder: str
    tokenizer: Any
    tokens: int | None

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, special tokens included."""
        return len(self.tokenizer(text, verbose=False).input_ids)

    def truncates(self, text: str) -> bool:
        """Return whether the encoder does not read a text to its end."""
        return self.tokens is not None and self.count(text) > self.tokens

    def cuts_off(self, phrase: str, text: str) -> bool:
        """Return whether the encoder does not read the first occurrence of a phrase in a text."""
        return self.tokens is not None and is_truncated(phrase, text, self.tokenizer, self.tokens)

"""Prompts without the special tokens of a model's processor."""

from __future__ import annotations

from typing import Any


def remove_special_tokens(prompt: str, processor: Any) -> str:
    """Remove what a processor would read as an image or as the end of a message.

    Args:
        prompt: The prompt.
        processor: A processor of transformers with a tokenizer.
    """
    names = [*processor.tokenizer.all_special_tokens, getattr(processor, "image_token", "")]
    special = {str(name) for name in names} - {""}
    while found := [token for token in special if token in prompt]:
        for token in sorted(found, key=len, reverse=True):
            prompt = prompt.replace(token, "")
    return prompt

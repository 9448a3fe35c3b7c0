"""Which rows of a denoiser's call are drawn by which prompt of a pipeline's call.

Rows are recognized by their encoded text, so that the order of prompts, negative prompts and
guidance passes does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: Largest relative difference of two encodings of one prompt. Rounding in bfloat16 stays below it;
#: the encodings of other prompts differ more.
MATCH_TOLERANCE = 0.02


class PromptRows:
    """Recognizes the rows of prompts.

    Args:
        encoded: (tokens, width) of each prompt of the call, in their order.
    """

    def __init__(self, encoded: Sequence[Tensor]) -> None:
        self._encoded = encoded
        self._matches: dict[int, tuple[Any, dict[int, list[int]]]] = {}

    def match(self, texts: Any, texts_per_row: int = 1) -> dict[int, int]:
        """Return row -> index of its prompt, without rows of other prompts such as the empty one.

        Args:
            texts: (rows * texts_per_row, tokens, width), the text argument of the denoiser.
            texts_per_row: Number of text entries for each row.
        """
        # The comparison synchronizes with a GPU, so tensors of earlier steps are not compared
        # again; they are stored, so that their ids are not reused.
        if id(texts) not in self._matches:
            matches = {
                row: [
                    index
                    for index, encoded in enumerate(self._encoded)
                    if is_same_prompt(texts[row * texts_per_row], encoded)
                ]
                for row in range(len(texts) // texts_per_row)
            }
            found = {row: candidates for row, candidates in matches.items() if candidates}
            self._matches[id(texts)] = (texts, found)
        matches = self._matches[id(texts)][1]
        prompts = {}
        for position, (row, candidates) in enumerate(matches.items()):
            # Images of one prompt are adjacent rows; equal prompts are distinguished by position.
            expected = position * len(self._encoded) // len(matches)
            prompts[row] = expected if expected in candidates else candidates[0]
        return prompts


def replace_rows(
    arguments: Mapping[str, Any],
    replacements: Mapping[str, Any],
    entries: Sequence[int],
    *,
    replaces_all: bool,
) -> dict[str, Any]:
    """Return the replaced arguments: some entries of each are replaced, in their order.

    Args:
        arguments: argument -> tensor with a row for each entry, list, or dict of such.
        replacements: The same for the entries alone.
        entries: The indices of the entries.
        replaces_all: Whether these are all entries.
    """
    replaced: dict[str, Any] = {}
    for name, value in replacements.items():
        old: Any = arguments.get(name)
        if isinstance(value, Mapping):
            inner = replace_rows(old or {}, value, entries, replaces_all=replaces_all)
            replaced[name] = dict(old or {}) | inner
        elif isinstance(value, list):
            replaced[name] = list(old or [])
            for entry, item in zip(entries, value, strict=True):
                replaced[name][entry] = item.to(replaced[name][entry])
        elif replaces_all:
            replaced[name] = value if old is None else value.to(old)
        else:
            replaced[name] = old.clone()
            replaced[name][list(entries)] = value.to(old)
    return replaced


def is_same_prompt(text: Tensor, expected: Tensor) -> bool:
    """Whether encodings (tokens, ...) are of one prompt; the shorter one is zero-padded."""
    a, b = text.float(), expected.to(text.device, torch.float32)
    if a.shape[1:] != b.shape[1:]:
        return False
    length = min(len(a), len(b))
    squares = (a[:length] - b[:length]).square().sum()
    squares = squares + a[length:].square().sum() + b[length:].square().sum()
    return bool(squares.sqrt() <= MATCH_TOLERANCE * b.square().sum().sqrt())

"""What references share and a call avoids, removed from the values of their tokens.

The tokens of references have no words that could be left out. But their values are added to those
of the text in each cross-attention layer, so a word has a direction among them: that of the base's
own values of the word. In each attention head::

    D = orthonormal basis of  W_v (word - empty prompt)  of all avoided words
    value' = value - strength * confidence * value D D^T

where W_v is the base's projection of text to values, without updates of concepts and adapters.
``confidence`` is 0 for values that overlap D no more than chance
(:func:`customize.core.projection.overlap_confidence`). Of 24 identities that no benchmark uses,
with two pictures each and strength 1.25, 92 % keep their colour and 44 % their identity where
another colour is avoided (81 % and 42 % without confidence), and 23 % still show a pattern that is
avoided (17 %). On 24 others identity is 54 % (42 %), and 17 % show the pattern (15 %).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from customize.concepts.base_weight import base_layer
from customize.core.projection import overlap_confidence, principal_directions, project_out


@dataclass(frozen=True, eq=False)
class AvoidedText:
    """The encoded words that rows of a call avoid.

    Attributes:
        words: (rows, k, width), encoded words minus the encoded empty prompt; zeros for no word.
        strength: From 0 (no change) over 1 (removed) to 2 (reversed).
    """

    words: Tensor
    strength: float


class TextValues:
    """Values of encoded text in one attention layer of the base, by attention head.

    Args:
        projection: The layer's projection of text to values, whose updates are left out.
        heads: Number of attention heads.
    """

    def __init__(self, projection: nn.Module, heads: int) -> None:
        self._projection: Any = base_layer(projection)
        self._heads = heads

    @torch.no_grad()
    def directions(self, words: Tensor) -> Tensor:
        """Return an orthonormal basis of the values of words for each row and head.

        Args:
            words: (rows, k, width), encoded words minus the encoded empty prompt.

        Returns:
            (rows, heads, at most k, width of a head), float32; zeros in place of missing ones.
        """
        values = self._projection(words)
        bias = getattr(self._projection, "bias", None)
        return principal_directions(self._split(values if bias is None else values - bias))

    def remove(self, values: Tensor, directions: Tensor, strength: float) -> Tensor:
        """Remove directions from the values of reference tokens.

        Args:
            values: (rows, ..., heads * width of a head).
            directions: As :meth:`directions` returns them, with the same rows.
            strength: See :class:`AvoidedText`.

        Returns:
            The values' shape and dtype.
        """
        by_head = self._split(values.flatten(1, -2))
        factor = strength * overlap_confidence(by_head, directions)
        removed = project_out(by_head, directions, factor)
        return removed.transpose(-2, -3).reshape(values.shape)

    def _split(self, values: Tensor) -> Tensor:
        """Reshape (rows, n, width) to (rows, heads, n, width of a head)."""
        return values.unflatten(-1, (self._heads, -1)).transpose(-2, -3)

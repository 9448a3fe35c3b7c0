"""The positions of a text whose features are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def normalize_rows(mask: Tensor) -> Tensor:
    """Turn a mask into weights that sum to 1 in each row.

    Args:
        mask: (rows, positions), true or 1 where a position counts.

    Returns:
        (rows, positions), float32; a row in which no position counts stays 0.
    """
    mask = mask.float()
    return mask / mask.sum(1, keepdim=True).clamp(min=1.0)


def end_position(ids: Sequence[int], end: int) -> int:
    """Return the position at which CLIP pools a text: its first end-of-text token.

    Args:
        ids: Token ids of one text.
        end: Id of the end-of-text token.

    Raises:
        ValueError: The text has no such token.
    """
    return ids.index(end)


def highest_id_position(ids: Sequence[int], end: int) -> int:
    """Return the position of the highest id, at which ClassDiffusion's published code pools.

    CLIP's first version pooled there as well. The ids of new tokens are above all others, so this
    is the concept's last token. CLIP is causal, so the words behind it, the class word among them,
    do not affect the feature. A text without new tokens is pooled at its end.

    Args:
        ids: Token ids of one text.
        end: Not used; for the signature of :func:`end_position`.
    """
    return ids.index(max(ids))


#: Value of the setting ``preserve_pooling`` -> position of a text's feature.
POOLINGS: dict[str, Callable[[Sequence[int], int], int]] = {
    "end": end_position,
    "published": highest_id_position,
}


def common_positions(learned: Sequence[int], base: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the positions of the tokens that two texts share before and after their difference.

    The trigger and the class word may have different numbers of tokens. So positions before the
    difference count from the start, and those after it from the end.

    Args:
        learned: Token ids of one text, from start to end of text, without padding.
        base: The same of the other text, which differs in the middle.

    Returns:
        Positions in ``learned`` and in ``base``; as many, of the same ids.
    """
    shorter = min(len(learned), len(base))
    before = 0
    while before < shorter and learned[before] == base[before]:
        before += 1
    after = 0
    while after < shorter - before and learned[-1 - after] == base[-1 - after]:
        after += 1

    def positions(length: int) -> list[int]:
        return [*range(before), *range(length - after, length)]

    return positions(len(learned)), positions(len(base))


def gather_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """Select the states at some positions of each row.

    Args:
        hidden: (rows, length, width).
        positions: (rows, n), int64, below ``length``.

    Returns:
        (rows, n, width), the dtype of ``hidden``.
    """
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))

"""Where the tokens of a prompt and of a picture lie in the layers of a denoiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

#: The positions of a layer: those of the picture, of the prompt, or of both in this order. Layers
#: of "text_rows" have the prompt's tokens along the first axis, behind one another.
TokenKind = Literal["picture", "text", "text_rows", "text_picture", "picture_text"]


@dataclass(frozen=True)
class TextAttention:
    """An attention in which positions of the picture attend to the tokens of the prompt.

    Attributes:
        name: Full name of the module.
        query: Name of the projection in it that the queries of the picture come from.
        key: Name of the projection that the keys of the prompt come from.
        tokens: The positions of the queries.
        bias: Name of the module's argument that is added to the scores, (batch, positions, tokens);
            empty if it has none.
    """

    name: str
    query: str = "to_q"
    key: str = "to_k"
    tokens: TokenKind = "picture"
    bias: str = ""


@dataclass(frozen=True, eq=False)
class PromptText:
    """The text that a text encoder without learned tokens reads: a prompt, often in a template.

    Attributes:
        tokenizer: Its tokenizer.
        text: The prompt in its template.
        shift: The row of the encoded prompt that the text's first token has; negative where the
            template is removed.
        rows: The number of rows of the encoded prompt up to the last one of this text.
        special_tokens: Whether the tokenizer adds such as the one that ends a text.
    """

    tokenizer: Any
    text: str
    shift: int
    rows: int
    special_tokens: bool = True


def count_prompt_tokens(prompt_text: PromptText) -> int:
    """Return the number of tokens of a text, without padding."""
    tokens = prompt_text.tokenizer(
        prompt_text.text, add_special_tokens=prompt_text.special_tokens, verbose=False
    )
    return len(tokens.input_ids)


def complex_rotations(rotations: Any) -> Tensor:
    """Convert a rotary embedding to complex numbers.

    Args:
        rotations: Cosines and sines, each (tokens, width) with pairs of equal numbers; or complex.

    Returns:
        (tokens, width / 2), or as given.
    """
    if isinstance(rotations, Tensor):
        return rotations
    cosines, sines = (part[..., ::2].float() for part in rotations)
    return torch.complex(cosines, sines)


def rotate(states: Tensor, rotations: Tensor | None) -> Tensor:
    """Apply a rotary embedding to queries or keys.

    Args:
        states: (batch, tokens, heads, width), float32.
        rotations: (tokens, width / 2) or (batch, tokens, width / 2), complex; None for none.

    Returns:
        In the shape of the states.
    """
    if rotations is None:
        return states
    pairs = torch.view_as_complex(states.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotations.to(pairs).unsqueeze(-2)).flatten(-2)

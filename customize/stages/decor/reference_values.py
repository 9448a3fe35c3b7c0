"""DECOR on references: the words of what is avoided in the tokens of reference images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from customize.families import Family
from customize.pipeline.call_scope import separate_call_scope
from customize.stages.decor.phrase_rows import mean_phrase_rows

#: What precedes a phrase in the texts that it is encoded in.
PREFIXES = ("", "a photo of a ")


@dataclass(frozen=True)
class AvoidedContent:
    """What a call avoids, for the stages after ``avoid=``.

    Attributes:
        phrases: For each prompt of the call the phrases.
        strength: From 0 to 2; None: the default of each stage.
    """

    phrases: tuple[tuple[str, ...], ...]
    strength: float | None


@torch.no_grad()
def encode_phrases(family: Family, phrases: Sequence[str]) -> dict[str, Tensor]:
    """Encode phrases apart from the present call, which may clean what it encodes.

    Args:
        family: A model whose denoiser reads prompts as they are encoded.
        phrases: The phrases.

    Returns:
        Phrase -> (tokens of the phrase, width): its rows minus the empty prompt's, float32.

    Raises:
        ConfigError: A phrase has more tokens than the text encoder reads.
    """
    texts = ["", *(prefix + phrase for phrase in phrases for prefix in PREFIXES)]
    with separate_call_scope():
        rows = family.encode_prompts(texts)["prompt_embeds"]
    encoded = dict(zip(texts, rows.float(), strict=True))
    tokenizer = family.token_dictionaries()[0].tokenizer
    empty = encoded[""][1]  # of the end of the text, which is the only token
    return {p: mean_phrase_rows(p, PREFIXES, encoded, tokenizer) - empty for p in phrases}

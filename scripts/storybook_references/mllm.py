"""The miniature multimodal LLM: a Qwen2-VL of about 3.6 M parameters, its tokenizer, its images."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from customize.references.config import ReferencesConfig
from customize.references.encoder_inputs import ReferenceProcessor
from customize.storybook.bundled_models import TEXT_WIDTH
from customize.storybook.caption_grammar import WORDS
from customize.storybook.world import ACCESSORIES

PATCH, MERGE, SIDE = 8, 2, 64
HIDDEN, LAYERS = 192, 5
NUM_TOKENS = 16
ATTRIBUTES = ("colour", "pattern", "shape", "accessory", "background")

#: Words of questions and answers beside those of captions; each is one token, also behind a space.
QUESTION_WORDS = (
    "draw what these images share : describe details same different all odd image ? is are yes no "
    "body accent mark eye eyes width height head ear size hue upright level beside wearing number "
    "user assistant system You are a helpful ."
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")

CONFIG = ReferencesConfig(
    family="sd",
    width=TEXT_WIDTH,
    num_tokens=NUM_TOKENS,
    attention="bidirectional",
    positions="image_grid",
    normalize_twice=False,
    includes_prompt=False,
    lora_rank=16,
    lora_alpha=16.0,
    attributes=ATTRIBUTES,
)


def _split(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Apply the merges so far to a word."""
    pieces = list(word)
    while len(pieces) > 1:
        rank, k = min((ranks.get(pair, len(ranks)), k) for k, pair in enumerate(pairwise(pieces)))
        if rank == len(ranks):
            break
        pieces[k : k + 2] = [pieces[k] + pieces[k + 1]]
    return pieces


def make_tokenizer() -> Any:
    """A byte-level tokenizer in which every word, alone or behind a space, is one token."""
    words = sorted(
        {*WORDS, *QUESTION_WORDS.split(), *ATTRIBUTES, *ACCESSORIES, *(f"{n}" for n in range(10))}
    )
    alphabet = sorted(ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)}
    ranks: dict[tuple[str, str], int] = {}
    for form in [form for word in words for form in (word, "\u0120" + word)]:
        pieces = _split(form, ranks)  # by the merges of earlier words, which rank lower
        while len(pieces) > 1:
            ranks[(pieces[0], pieces[1])] = len(ranks)
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            vocab.setdefault(pieces[0], len(vocab))
    vocab["<|endoftext|>"] = len(vocab)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=list(ranks))
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return tokenizer


def make_processor() -> ReferenceProcessor:
    """The tokenizer, and 16 tokens for an image of 64 x 64 pixels, to which all are resized."""
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        temporal_patch_size=1,
        merge_size=MERGE,
        size={"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return ReferenceProcessor(make_tokenizer(), images)


def make_mllm(vocabulary: int) -> Qwen2VLModel:
    """A Qwen2-VL with random weights.

    Args:
        vocabulary: Number of tokens.
    """
    return Qwen2VLModel(
        Qwen2VLConfig(
            text_config={
                "vocab_size": vocabulary,
                "bos_token_id": None,
                "eos_token_id": None,
                "hidden_size": HIDDEN,
                "intermediate_size": 512,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 6,
                "num_key_value_heads": 3,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10_000.0,
                    "mrope_section": [4, 6, 6],
                },
            },
            vision_config={
                "depth": 5,
                "embed_dim": 128,
                "hidden_size": HIDDEN,
                "num_heads": 4,
                "mlp_ratio": 4,
                "patch_size": PATCH,
                "temporal_patch_size": 1,
            },
        )
    )


if __name__ == "__main__":  # the sizes
    tokenizer = make_tokenizer()
    model = make_mllm(len(tokenizer))
    count = sum(parameter.numel() for parameter in model.parameters())
    sys.stdout.write(f"{len(tokenizer)} tokens, {count / 1e6:.2f} M parameters\n")

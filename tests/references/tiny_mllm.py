"""A small random Qwen2-VL with its tokenizer and image processor."""

from __future__ import annotations

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLModel,
    Qwen3VLConfig,
    Qwen3VLModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from customize.references.config import ReferencesConfig
from customize.references.encoder import ReferenceEncoder
from customize.references.encoder_inputs import ReferenceProcessor

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def tiny_processor() -> ReferenceProcessor:
    """A byte-level tokenizer, and patches of 8 x 8 pixels of which 2 x 2 are merged."""
    vocab = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    vocab["<|endoftext|>"] = len(vocab)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    images = Qwen2VLImageProcessorPil(
        patch_size=8,
        temporal_patch_size=1,
        merge_size=2,
        size={"shortest_edge": 32 * 32, "longest_edge": 48 * 48},
    )
    return ReferenceProcessor(tokenizer, images)


def tiny_mllm(kind: str = "qwen2_vl", layers: int = 3, hidden: int = 32) -> nn.Module:
    """An MLLM of random weights.

    Args:
        kind: Its type, as in transformers' configurations.
        layers: Number of decoder layers.
        hidden: Width of the decoder.
    """
    torch.manual_seed(0)
    text = {
        "vocab_size": 300,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
        },
    }
    vision = {"depth": 2, "num_heads": 2, "patch_size": 8, "temporal_patch_size": 1}
    wide = vision | {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": hidden}
    if kind == "qwen2_5_vl":
        # Windows of 2 x 2 merged tokens in the first layer.
        window = {"window_size": 32, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLModel(
            Qwen2_5_VLConfig(text_config=text, vision_config=wide | window)
        ).eval()
    if kind == "qwen3_vl":
        deepstack = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
        text["head_dim"] = hidden // 4
        return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=wide | deepstack)).eval()
    own = {"embed_dim": 16, "hidden_size": hidden, "mlp_ratio": 2}
    return Qwen2VLModel(Qwen2VLConfig(text_config=text, vision_config=vision | own)).eval()


def tiny_encoder(width: int = 32, kind: str = "qwen2_vl", **settings: object) -> ReferenceEncoder:
    """An encoder with 4 reference tokens."""
    config = ReferencesConfig(family="sd", width=width, num_tokens=4, **settings)  # type: ignore[arg-type]
    return ReferenceEncoder(config, tiny_mllm(kind)).eval()

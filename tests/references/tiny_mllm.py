"""A small random Qwen2-VL with its tokenizer and image processor."""

from __future__ import annotations

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLModel
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


def tiny_mllm(layers: int = 3, hidden: int = 32) -> Qwen2VLModel:
    """A Qwen2-VL of random weights."""
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
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
        },
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": hidden,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 8,
            "temporal_patch_size": 1,
        },
    )
    return Qwen2VLModel(config).eval()


def tiny_encoder(width: int = 32, **settings: object) -> ReferenceEncoder:
    """An encoder with 4 reference tokens."""
    config = ReferencesConfig(family="sd", width=width, num_tokens=4, **settings)  # type: ignore[arg-type]
    return ReferenceEncoder(config, tiny_mllm()).eval()

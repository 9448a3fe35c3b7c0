"""Small CLIP and DINO models with random weights, on disk as hubs have them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    Dinov2Config,
    Dinov2Model,
)

from tests.tiny import clip_tokenizer


def save_clip(folder: Path) -> Path:
    """A CLIP of width 16 for pictures of 24 x 24."""
    tokenizer = clip_tokenizer()
    layers = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {
        **layers,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**layers, "image_size": 24, "patch_size": 8}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
        for parameter in model.parameters():  # larger, so that pictures and texts are told apart
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
    )
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def save_dino(folder: Path) -> Path:
    """A DINOv2 of width 16 for pictures of 28 x 28."""
    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=28,
        patch_size=14,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = Dinov2Model(config)
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(folder)
    return folder

"""Images, and small CLIP, DINO and BLIP models with random weights, saved as on the hub."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    BertTokenizer,
    BitImageProcessorPil,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    Dinov2Config,
    Dinov2Model,
)

from tests.tiny import WORDS, clip_tokenizer

# Tokens that the small BLIP models read.
BLIP_LENGTH = 24


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Smooth pictures of odd sizes, all different."""
    rng = np.random.default_rng(seed)
    return [
        Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((50 + k, 40))
        for k in range(count)
    ]


def pixels(folder: Path, images: list[Image.Image]) -> Tensor:
    return AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]


def spread(model: nn.Module) -> None:
    """Make random weights larger, so that pictures and texts are told apart."""
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))


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
        spread(model)
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
        spread(model)
    model.save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(folder)
    return folder


def bert_tokenizer() -> BertTokenizer:
    """BERT's tokenizer with WORDS for a vocabulary."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return BertTokenizer(vocab=vocab, model_max_length=512)


_LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}


def save_blip(folder: Path) -> Path:
    """A BLIP for image-text retrieval, for pictures of 24 x 24."""
    tokenizer = bert_tokenizer()
    text = {
        **_LAYERS,
        "num_attention_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": BLIP_LENGTH,
    }
    vision = {**_LAYERS, "num_attention_heads": 2, "image_size": 24, "patch_size": 8}
    config = BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=12)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = BlipForImageTextRetrieval(config)
        spread(model)
    model.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_blip2(folder: Path, placeholders: bool = False) -> Path:
    """A BLIP-2 for image-text retrieval, for pictures of 24 x 24.

    Args:
        placeholders: The processor inserts placeholders of the image into the text, as newer
            files have it.
    """
    tokenizer, queries = bert_tokenizer(), 3
    processor = Blip2Processor(
        BlipImageProcessorPil(size={"height": 24, "width": 24}),
        tokenizer,
        num_query_tokens=queries if placeholders else None,
    )
    reader = {
        **_LAYERS,
        "num_attention_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": BLIP_LENGTH,
        "use_qformer_text_input": True,
    }
    vision = {**_LAYERS, "num_attention_heads": 2, "image_size": 24, "patch_size": 8}
    config = Blip2Config(
        qformer_config=reader,
        vision_config=vision | {"initializer_range": 0.02},
        num_query_tokens=queries,
        image_text_hidden_size=12,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>") if placeholders else None,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = Blip2ForImageTextRetrieval(config)
        spread(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder

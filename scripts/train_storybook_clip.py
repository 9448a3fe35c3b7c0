"""Train a CLIP for the storybook from scratch: `python scripts/train_storybook_clip.py`.

A reward for rewriters that no judge shares weights with: a miniature CLIP that knows users' words
and mistakes. Pictures come in pairs that differ in one attribute, and are degraded as generated
ones are. Heads that read the attributes from the embeddings of pictures and of texts are trained
along and thrown away: without them 650 steps leave classes and patterns near chance.

Run the script again to resume from `--folder`, which receives checkpoints and losses (log.jsonl).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)

from customize.storybook.bundled_assets import assets_folder
from customize.storybook.judges import HEADS
from storybook_clip.scene_pairs import ATTRIBUTES, render_pairs, write_prompt
from storybook_training.judge_data import labels, roughen
from storybook_training.pretrain_base import train_loop, training_context
from storybook_training.training_files import log_row

WIDTH, LENGTH, VOCABULARY, SIDE = 128, 77, 1024, 64
MEASURED = 512  # pairs that no step has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/storybook-clip"))
    parser.add_argument("--pairs", type=int, default=12_000)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=48, help="pairs of a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--base", type=Path, default=assets_folder() / "storybook")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    pixels, pairs = render_pairs(args.folder / "pairs.bin", args.pairs)
    tokenizer = make_tokenizer(pairs)
    torch.manual_seed(0)
    model, heads = make_model(tokenizer), AttributeHeads()
    targets = make_targets(pairs)
    vae = AutoencoderKL.from_pretrained(args.base, subfolder="vae").requires_grad_(False).eval()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)

    def loss_of(generator: torch.Generator) -> Tensor:
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        rows = rng.integers(MEASURED, args.pairs, size=args.batch)
        # The autoencoder takes a third of a step's time.
        images = roughen(as_images(pixels[rows]), generator, vae if rng.random() < 0.3 else None)
        texts = [write_prompt(rng, pairs[row][k]) for row in rows for k in range(2)]
        found = run_clip(model, tokenizer, images, texts)
        logits, target = found.logits_per_image, torch.arange(len(texts))
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        wanted = {name: values[rows].flatten() for name, values in targets.items()}
        return contrast + heads(found.image_embeds, wanted) + heads(found.text_embeds, wanted)

    def on_checkpoint(step: int) -> None:
        save(args.folder / "model", model, tokenizer)
        log_row(args.folder, stage="clip", step=step, **measure(model, tokenizer, pixels, pairs))
        model.train()

    model.train()
    modules: dict[str, nn.Module] = {"clip": model, "heads": heads}
    with training_context("cpu", bf16=False):
        train_loop("clip", args.folder, modules, loss_of, args.steps, args.lr, 0, on_checkpoint)
    print(f"the CLIP is in {args.folder / 'model'}")


def make_tokenizer(pairs: list[Any]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on prompts."""
    rng = np.random.default_rng(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((write_prompt(rng, pair[0]) for pair in pairs), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", 1), ("<|end|>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|start|>",
        eos_token="<|end|>",
        model_max_length=LENGTH,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """A CLIP with random weights."""
    layers = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": 4}
    text = {
        **layers,
        "num_hidden_layers": 3,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**layers, "num_hidden_layers": 4, "image_size": SIDE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def as_images(pixels: np.ndarray) -> Tensor:
    """Pairs (n, 2, 64, 64, 3) uint8 as images (2n, 3, 64, 64) in [-1, 1]."""
    flat = torch.from_numpy(pixels.reshape(-1, SIDE, SIDE, 3)).permute(0, 3, 1, 2)
    return flat.float() / 127.5 - 1


class AttributeHeads(nn.Module):
    """Reads attributes from embeddings (n, WIDTH) of unit length; both towers share it."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {name: len(words) for name, words in HEADS.items()}
        self.linear = nn.ModuleDict({name: nn.Linear(WIDTH, n) for name, n in sizes.items()})

    def forward(self, embeddings: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """The mean cross-entropy of the heads; targets of -1 do not count."""
        losses = [
            F.cross_entropy(self.linear[name](WIDTH**0.5 * embeddings), target, ignore_index=-1)
            for name, target in targets.items()
        ]
        return torch.stack(losses).mean()


def make_targets(pairs: list[Any]) -> dict[str, Tensor]:
    """Head -> classes (pairs, 2)."""
    found = [[labels(scene) for scene in pair[:2]] for pair in pairs]
    return {name: torch.tensor([[each[name] for each in pair] for pair in found]) for name in HEADS}


def run_clip(
    model: CLIPModel, tokenizer: PreTrainedTokenizerFast, images: Tensor, texts: list[str]
) -> Any:
    """The output for images (n, 3, 64, 64) in [-1, 1] and texts."""
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    return model(pixel_values=images, **inputs)


@torch.no_grad()
def measure(
    model: CLIPModel, tokenizer: PreTrainedTokenizerFast, pixels: np.ndarray, pairs: list[Any]
) -> dict[str, float]:
    """Share of pictures whose own prompt scores higher than its twin's, by attribute."""
    rng = np.random.default_rng(1)
    hits: dict[str, list[float]] = {}
    for first in range(0, MEASURED, 64):
        rows = range(first, first + 64)
        texts = [write_prompt(rng, pairs[row][k]) for row in rows for k in range(2)]
        images = as_images(pixels[first : first + 64])
        logits = run_clip(model, tokenizer, images, texts).logits_per_image
        for k, row in enumerate(rows):
            block = logits[2 * k : 2 * k + 2, 2 * k : 2 * k + 2]
            right = (block.argmax(1) == torch.arange(2)).float().mean().item()
            hits.setdefault(pairs[row][2], []).append(right)
    shares = {name: sum(hits[name]) / len(hits[name]) for name in ATTRIBUTES if name in hits}
    return {**shares, "mean": sum(shares.values()) / len(shares)}


def save(folder: Path, model: CLIPModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the model in half precision, with its processor."""
    half = make_model(tokenizer)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(folder)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    main()

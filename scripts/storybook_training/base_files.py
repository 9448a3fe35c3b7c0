"""Files of a base: initial weights from another base, and the finished pipeline."""

from __future__ import annotations

from pathlib import Path

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save
from transformers import CLIPTextModel, CLIPTokenizer

from customize.atomic import write_atomic

from .training_files import halved


def load_start(
    start: Path,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> None:
    """Load the initial weights from a base, also from one of another world.

    Of embeddings, the rows of tokens and positions that both bases have are loaded.
    """
    base = UNet2DConditionModel.from_pretrained(start, subfolder="unet")
    unet.load_state_dict(base.state_dict())
    known = CLIPTokenizer.from_pretrained(start, subfolder="tokenizer").get_vocab()
    own = tokenizer.get_vocab()
    shared = sorted(own.keys() & known.keys())
    rows, known_rows = ([vocab[token] for token in shared] for vocab in (own, known))
    source = CLIPTextModel.from_pretrained(start, subfolder="text_encoder")
    weights = source.state_dict()
    for name, target in text_encoder.state_dict().items():
        if name.endswith("token_embedding.weight"):
            target[rows] = weights[name][known_rows].to(target)
        elif name.endswith("position_embedding.weight"):
            count = min(len(target), len(weights[name]))
            target[:count] = weights[name][:count]
        else:
            target.copy_(weights[name])


def save_base(pipe: StableDiffusionPipeline, folder: Path, attribution: str = "") -> None:
    """Write the pipeline as float16 safetensors, without changing the dtype of the live one.

    Args:
        pipe: The pipeline.
        folder: The folder to write to.
        attribution: Text of ATTRIBUTION.md; "": there is no such file.
    """
    pipe.save_pretrained(folder, safe_serialization=True)
    if attribution:
        write_atomic(folder / "ATTRIBUTION.md", attribution.encode())
    for path in folder.rglob("*.safetensors"):
        write_atomic(path, save(halved(load_file(path)), metadata={"format": "pt"}))

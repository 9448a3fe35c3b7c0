"""The bundled reference model, or a random one of its architecture while none is bundled."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from customize.families import family_of
from customize.references.encoder import ReferenceEncoder
from customize.references.model import ReferenceModel
from customize.references.seams import make_adapter
from customize.storybook.bundled_assets import assets_folder, references_folder
from scripts.storybook_references.mllm import CONFIG, make_mllm, make_processor
from tests.references.tiny_model import randomize


def storybook_references(folder: Path) -> Path:
    """Return the folder of the bundled model; a random one is written to ``folder``."""
    bundled = references_folder()
    if bundled is not None:
        return bundled
    pipe = DiffusionPipeline.from_pretrained(assets_folder() / "storybook")
    processor = make_processor()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        encoder = ReferenceEncoder(CONFIG, make_mllm(len(processor.tokenizer))).eval()
        adapter = make_adapter(CONFIG, family_of(pipe.components))
        randomize(adapter)
    model = ReferenceModel(CONFIG, encoder, adapter, processor)
    return model.save_pretrained(folder, torch.float16)

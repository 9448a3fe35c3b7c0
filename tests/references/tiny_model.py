"""A small random reference model for a pipeline."""

from __future__ import annotations

import torch

from customize.families import family_of
from customize.references.adapter import ReferenceAdapter
from customize.references.config import ReferencesConfig
from customize.references.encoder import ReferenceEncoder
from customize.references.model import ReferenceModel
from customize.references.seams import make_adapter
from tests.references.tiny_mllm import tiny_mllm, tiny_processor


def randomize(adapter: ReferenceAdapter) -> None:
    """Make LoRAs that change the result."""
    for update in adapter.updates().values():
        torch.nn.init.normal_(update.lora_B.weight, std=0.1)


def tiny_reference_model(components, width: int = 32, **settings: object) -> ReferenceModel:
    """A model with 4 tokens and LoRAs of rank 2, which changes every picture visibly."""
    family = family_of(components)
    values = {"lora_rank": 2, "lora_alpha": 4.0, "includes_prompt": False} | settings
    config = ReferencesConfig(family.name, width, num_tokens=4, **values)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(3)
        encoder = ReferenceEncoder(config, tiny_mllm()).eval()
        adapter = make_adapter(config, family)
        randomize(adapter)
        for name in adapter.layers.attentions:  # so that images matter, whose tokens are similar
            weight = adapter.value(name).weight.data
            if not weight.any():
                weight.normal_(std=0.2)
            weight.mul_(20.0)
    return ReferenceModel(config, encoder, adapter, tiny_processor())

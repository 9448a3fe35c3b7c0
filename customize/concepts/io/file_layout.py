"""File names of concepts and merges, and the tensors and headers that the files contain."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from customize.concepts.tokens.layerwise_embeddings import mean_rows
from customize.concepts.tokens.subjects import Subject
from customize.concepts.types import Concept

LORA_FILE = "pytorch_lora_weights.safetensors"
# Stock diffusers reads the updates of a second denoiser from a separate file, by the first one's
# name: load_lora_weights(..., load_into_transformer_2=True).
SECOND_LORA_FILE = "pytorch_lora_weights_2.safetensors"
SECOND_DENOISERS = {"transformer_2": "transformer"}
EMBEDS_FILE = "learned_embeds.safetensors"
LAYERWISE_EMBEDS_FILE = "layerwise_embeds.safetensors"
INFO_FILE = "concept.json"
# Recorded layer inputs, beside a concept or LoRA; see customize.concepts.input_statistics.
LAYER_INPUTS_FILE = "layer_inputs.safetensors"
# Key layouts of merged LoRAs.
KEY_LAYOUTS = ("diffusers", "kohya")
# Files that peft's save_pretrained writes.
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
# Marks a folder as a diffusers pipeline.
PIPELINE_FILE = "model_index.json"
CARD_FILE = "README.md"
# Files of a merge beside its LoRA: its facts, and the tokens of each concept.
MERGED_FILE = "merged.json"
MERGED_EMBEDS_FILE = "learned_embeds_{}.safetensors"
KOHYA_EMBEDS_FOLDER = "embeddings"
RESERVATION_FILE = ".slice.json"
# Files and folders of training runs in a concept's folder.
TRAINING_FILES = frozenset(
    {RESERVATION_FILE, ".checkpoints", ".class_pictures", "logs", "validation", "samples"}
)

PEFT_HEADER = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY
INFO_HEADER = "customize_concept"
# diffusers refuses LoRA files with a key that does not contain "lora".
EMBEDS_PREFIX = "lora_concept_embeds."
# Keys of embedding files for the two CLIP encoders of SDXL and SD3, as the community names them.
COMMUNITY_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
DIGEST_KEY = "sha256"  # an additional field of concept.json


def digest_concept(concept: Concept) -> str:
    """SHA-256 of the facts, and of the names, dtypes, shapes and bytes of all tensors.

    The facts are included because they define the slices, on which merging depends. The digest does
    not depend on the distribution of tensors over files.
    """
    facts = json.dumps(concept.info.model_dump(), sort_keys=True, allow_nan=False)
    digest = hashlib.sha256(facts.encode())
    for key, tensor in sorted((lora_tensors(concept) | bundled_embeddings(concept)).items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def lora_tensors(concept: Concept) -> dict[str, Tensor]:
    """All factors by peft's keys: ``component.module.lora_A.weight`` and ``lora_B``."""
    tensors = {}
    for component, updates in concept.updates.items():
        for module, update in updates.items():
            tensors[f"{component}.{module}.lora_A.weight"] = update.down
            tensors[f"{component}.{module}.lora_B.weight"] = update.up
    return tensors


def split_lora_files(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """File name -> tensors: one file, or two for a model with a second denoiser."""
    files: dict[str, dict[str, Tensor]] = {LORA_FILE: {}}
    for key, tensor in tensors.items():
        component, _, layer_key = key.partition(".")
        if component in SECOND_DENOISERS:
            files.setdefault(SECOND_LORA_FILE, {})[f"{SECOND_DENOISERS[component]}.{layer_key}"] = (
                tensor
            )
        else:
            files[LORA_FILE][key] = tensor
    return files


def bundled_embeddings(concept: Concept) -> dict[str, Tensor]:
    """The token embeddings by the keys of a single file."""
    return {f"{EMBEDS_PREFIX}{key}": rows for key, rows in concept.embeddings.items()}


def embedding_tensors(subject: Subject) -> dict[str, Tensor]:
    """One embedding per token, as other programs read them: the mean over the layers.

    Returns:
        Key -> (tokens, width); the key is the trigger for one text encoder, clip_l and clip_g for
        two.
    """
    means = {key: mean_rows(rows) for key, rows in subject.embeddings.items()}
    if len(means) == 1:
        return {subject.trigger: next(iter(means.values()))}
    return {COMMUNITY_KEYS[key]: rows for key, rows in means.items()}


def peft_header(concept: Concept, file: str | None = None) -> str:
    """Adapter metadata of peft as JSON, for the header of a LoRA file.

    Args:
        concept: The concept.
        file: A file name of :func:`split_lora_files`; None for a single file with all tensors.
    """
    info = concept.info
    components = concept.updates
    if file is not None:
        components = {
            SECOND_DENOISERS.get(component, component): updates
            for component, updates in components.items()
            if (component in SECOND_DENOISERS) == (file == SECOND_LORA_FILE)
        }
    alpha = int(info.alpha) if info.alpha == int(info.alpha) else info.alpha
    header: dict[str, Any] = {}
    for component, updates in components.items():
        # Layers of text encoders by the last part of their names, because full names differ
        # between versions of transformers.
        clip = component.startswith("text_encoder")
        names = {module.rpartition(".")[2] if clip else module for module in updates}
        header[f"{component}.r"] = info.rank
        header[f"{component}.lora_alpha"] = alpha
        header[f"{component}.target_modules"] = sorted(names)
    return json.dumps(header)


def info_json(concept: Concept) -> str:
    """The content of ``concept.json``: the facts and the digest."""
    values = concept.info.model_dump() | {DIGEST_KEY: digest_concept(concept)}
    return json.dumps(values, indent=2, allow_nan=False)

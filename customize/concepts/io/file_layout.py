"""The layout of a concept's files: which tensor has which name, and what the headers say."""

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
# Of a pipeline with two denoisers, stock diffusers reads the second one's updates from a file of
# their own, under the first one's name: load_lora_weights(..., load_into_transformer_2=True).
SECOND_LORA_FILE = "pytorch_lora_weights_2.safetensors"
SECOND_DENOISERS = {"transformer_2": "transformer"}
EMBEDS_FILE = "learned_embeds.safetensors"
LAYERWISE_EMBEDS_FILE = "layerwise_embeds.safetensors"
INFO_FILE = "concept.json"
# Beside a concept or LoRA, and no part of it; see customize.concepts.input_statistics.
LAYER_INPUTS_FILE = "layer_inputs.safetensors"
# By whose keys a merged LoRA is written.
KEY_LAYOUTS = ("diffusers", "kohya")
# What peft's own save_pretrained writes.
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
# By which diffusers knows a pipeline's folder.
PIPELINE_FILE = "model_index.json"
CARD_FILE = "README.md"
# What a merge writes beside its LoRA: the facts, and each concept's tokens.
MERGED_FILE = "merged.json"
MERGED_EMBEDS_FILE = "learned_embeds_{}.safetensors"
KOHYA_EMBEDS_FOLDER = "embeddings"  # by kohya's keys
RESERVATION_FILE = ".slice.json"
# What training keeps in the same folder: its claim on a slice, its checkpoints, class pictures,
# logs, samples and validation.
TRAINING_FILES = frozenset(
    {RESERVATION_FILE, ".checkpoints", ".class_pictures", "logs", "validation", "samples"}
)

PEFT_HEADER = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY
INFO_HEADER = "customize_concept"
# diffusers refuses a LoRA file with a key in which "lora" does not occur.
EMBEDS_PREFIX = "lora_concept_embeds."
# The names that the community's files give to the tokens of SDXL's and SD3's two CLIP encoders.
COMMUNITY_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
DIGEST_KEY = "sha256"  # a field of the JSON beside those of ConceptInfo


def digest_concept(concept: Concept) -> str:
    """sha256 over the facts, and names, dtypes, shapes and bytes of all tensors.

    The facts say which slice of which basis the tensors are; with other facts merging would be
    wrong. Which file holds what makes no difference.
    """
    facts = json.dumps(concept.info.model_dump(), sort_keys=True, allow_nan=False)
    digest = hashlib.sha256(facts.encode())
    for key, tensor in sorted((lora_tensors(concept) | bundled_embeddings(concept)).items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def lora_tensors(concept: Concept) -> dict[str, Tensor]:
    tensors = {}
    for component, updates in concept.updates.items():
        for module, update in updates.items():
            tensors[f"{component}.{module}.lora_A.weight"] = update.down
            tensors[f"{component}.{module}.lora_B.weight"] = update.up
    return tensors


def split_lora_files(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """File -> its tensors: one file, or two where there is a second denoiser."""
    found: dict[str, dict[str, Tensor]] = {LORA_FILE: {}}
    for key, tensor in tensors.items():
        component, _, rest = key.partition(".")
        if component in SECOND_DENOISERS:
            found.setdefault(SECOND_LORA_FILE, {})[f"{SECOND_DENOISERS[component]}.{rest}"] = tensor
        else:
            found[LORA_FILE][key] = tensor
    return found


def bundled_embeddings(concept: Concept) -> dict[str, Tensor]:
    return {f"{EMBEDS_PREFIX}{key}": rows for key, rows in concept.embeddings.items()}


def embedding_tensors(subject: Subject) -> dict[str, Tensor]:
    """One embedding a token, as all loaders take them: the mean, where each layer has its own."""
    plain = {key: mean_rows(rows) for key, rows in subject.embeddings.items()}
    if len(plain) == 1:
        return {subject.trigger: next(iter(plain.values()))}
    return {COMMUNITY_KEYS[key]: rows for key, rows in plain.items()}


def peft_header(concept: Concept, file: str | None = None) -> str:
    """What the header of one of :func:`split_lora_files` says, or of a single file with all."""
    info = concept.info
    products = concept.updates
    if file is not None:
        products = {
            SECOND_DENOISERS.get(component, component): updates
            for component, updates in products.items()
            if (component in SECOND_DENOISERS) == (file == SECOND_LORA_FILE)
        }
    alpha = int(info.alpha) if info.alpha == int(info.alpha) else info.alpha
    header: dict[str, Any] = {}
    for component, updates in products.items():
        # The text encoder's layers by their endings, since their full names differ between
        # versions of transformers.
        clip = component.startswith("text_encoder")
        names = {module.rpartition(".")[2] if clip else module for module in updates}
        header[f"{component}.r"] = info.rank
        header[f"{component}.lora_alpha"] = alpha
        header[f"{component}.target_modules"] = sorted(names)
    return json.dumps(header)


def info_json(concept: Concept) -> str:
    values = concept.info.model_dump() | {DIGEST_KEY: digest_concept(concept)}
    return json.dumps(values, indent=2, allow_nan=False)

"""Writing merged concepts as one ordinary LoRA, which diffusers loads, with their tokens."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from customize.atomic import fsync_folder, partial_folder, write_new_file
from customize.concepts.adapter import match_to_model
from customize.concepts.formats.lora_file import check_has_no_vectors
from customize.concepts.formats.merged_lora import MERGED_HEADER
from customize.concepts.formats.write_kohya import (
    kohya_header,
    kohya_layer_rows,
    kohya_tensors,
    reshape_factors,
    weight_shapes,
)
from customize.concepts.input_statistics import LayerInputs
from customize.concepts.io.data_files import safetensors_bytes
from customize.concepts.io.file_layout import (
    CARD_FILE,
    KOHYA_EMBEDS_FOLDER,
    MERGED_EMBEDS_FILE,
    MERGED_FILE,
    embedding_tensors,
    split_lora_files,
)
from customize.concepts.io.output_folder import check_writable
from customize.concepts.merge.compatibility import check_compatible
from customize.concepts.merge.component_weights import BlockWeights, Weight
from customize.concepts.merge.merge_concepts import LayerMerge, plan_merge
from customize.concepts.merge.merged_model_card import diffusers_card, kohya_card, loadable_base
from customize.concepts.tokens.subjects import check_subjects, subjects_to_header
from customize.concepts.types import Adaptation, Concept
from customize.core.lowrank import LowRank, all_finite, distance, norm, pad_rank
from customize.core.scalars import is_integer
from customize.core.truncation import truncate
from customize.errors import ConceptError, ConfigError, StorageError, storage_error
from customize.families import Family, published_families
from customize.safe_read import as_path, read_bytes
from customize.text import quote

Updates = Mapping[str, Mapping[str, LowRank]]


@dataclass(frozen=True)
class MergeResult:
    """A written merge.

    Attributes:
        folder: The folder.
        rank: Component -> rank of its layers; layers of lower rank are padded with zeros.
        error: Relative error of truncation: the norm of the difference over the norm of the exact
            merge; 0 without truncation.
        method: Name of the merge method.
    """

    folder: Path
    rank: dict[str, int]
    error: float
    method: str


def write_merged(
    concepts: Sequence[Adaptation],
    weights: Sequence[Weight],
    folder: str | Path,
    *,
    method: str = "sum",
    settings: Mapping[str, Any] | None = None,
    inputs: Sequence[LayerInputs] = (),
    rank: int | None = None,
    layout: str = "diffusers",
    family: Family | None = None,
) -> MergeResult:
    """Merge concepts and write the merge as one LoRA, with the tokens of each concept.

    The folder gets ``pytorch_lora_weights.safetensors`` for ``pipe.load_lora_weights(folder)``
    (alpha equals the rank, so that loaders multiply by 1; a second denoiser has a file of its own,
    as for a concept), ``learned_embeds_<name>.safetensors`` for
    ``pipe.load_textual_inversion`` (the mean, if each cross-attention layer has its own
    embeddings), ``merged.json`` and ``README.md``. It is written atomically.

    With kohya's keys the LoRA is ``<folder>.safetensors``, with ranks that may differ between
    layers, and the tokens are ``embeddings/<name>.safetensors``, because ComfyUI and the web UIs
    name a token after its file. They are not bundled into the LoRA as ``bundle_emb`` keys, which
    only some of the web UIs read, and for which diffusers refuses the file.

    The header of the LoRA also contains the tokens, with those of each layer, so that either file
    can be parsed with all triggers (:mod:`customize.concepts.formats.merged_lora`).

    Args:
        concepts: At least one, all trained on one architecture.
        weights: One for each concept.
        folder: A new or empty folder, or one that contains the same merge already.
        method: Name of the merge method.
        settings: Settings of the method; see :func:`plan_merge`.
        inputs: Recorded inputs of the concepts, for methods that need them.
        rank: Highest rank of any layer, at least 1. None: the sum of the ranks, which is exact
            unless the method prunes.
        layout: One of :data:`customize.concepts.io.file_layout.KEY_LAYOUTS`.
        family: A model with these layers, for shapes and names that the updates do not show; None
            for the published model that has them.

    Raises:
        ConceptError: As :func:`plan_merge`; or if two concepts have one trigger, or no published
            model has these layers and one is needed.
        ConfigError: As :func:`plan_merge`; or if the rank is below 1, or the merge is zero or not
            finite.
        StorageError: If the folder contains something else, or cannot be written.
    """
    folder = as_path(folder, "output")
    check_compatible(concepts)
    subjects = [subject for concept in concepts for subject in concept.subjects]
    check_subjects(subjects)
    check_has_no_vectors(concepts)
    if rank is not None and not is_integer(rank):
        raise ConfigError(
            f"invalid rank {quote(rank)} of a merged LoRA",
            where="rank",
            fix="give an integer of at least 1",
        )
    settings = settings or {}
    updates, error = _compute_updates(
        plan_merge(concepts, weights, method, inputs, **settings), rank
    )
    if not updates:
        raise ConfigError("the weights leave no update to write", where="weights")
    # Sorted, because the order of tensors in a file varies, and one merge must give the same bytes.
    ranks = {c: max(update.rank for update in updates[c].values()) for c in sorted(updates)}
    facts = {
        "base": _base(concepts),
        "family": concepts[0].info.family,
        "fingerprint": next((dict(c.info.fingerprint) for c in concepts if c.info.fingerprint), {}),
        "words": " and ".join(
            concept.info.trigger_words for concept in concepts if concept.info.trigger_words
        ),
        "method": method,
        "settings": dict(settings),
        "rank": ranks,
        "truncation_error": error,
        "concepts": [
            {
                "name": concept.info.name,
                "trigger": concept.info.trigger_words,
                "class_word": concept.info.class_word,
                "weight": weight.text if isinstance(weight, BlockWeights) else float(weight),
            }
            for concept, weight in zip(concepts, weights, strict=True)
        ],
    }
    if layout == "kohya":
        files = _kohya_files(concepts, updates, family, folder.name, facts)
        text = kohya_card(concepts, weights, method, folder.name)
    else:
        # Only imported LoRAs change convolutions, whose kernel shapes the updates do not show.
        has_imported = any(not isinstance(concept, Concept) for concept in concepts)
        model = family
        if family is None and has_imported:
            model = _find_published(concepts[0].info.family, updates)
            if model is None and any(not concept.info.fingerprint for concept in concepts):
                raise _unpublished_error(concepts[0].info.family)
        tensors = _diffusers_tensors(updates, ranks, model)
        header = {MERGED_HEADER: json.dumps(facts), **subjects_to_header(subjects)}
        files = {
            name: safetensors_bytes(file_tensors, header)
            for name, file_tensors in split_lora_files(tensors).items()
            if file_tensors  # the first file is empty if only the second denoiser changes
        }
        for subject in subjects:
            files[MERGED_EMBEDS_FILE.format(subject.name)] = safetensors_bytes(
                embedding_tensors(subject), {}
            )
        text = diffusers_card(concepts, weights, method)
    files[MERGED_FILE] = (json.dumps(facts, indent=2) + "\n").encode()
    files[CARD_FILE] = text.encode()
    _write(folder, files)
    return MergeResult(folder, ranks, error, method)


def _diffusers_tensors(
    updates: Updates, ranks: Mapping[str, int], family: Family | None
) -> dict[str, torch.Tensor]:
    tensors = {}
    for component, component_updates in updates.items():
        shapes = weight_shapes(family, component) if family is not None else {}
        for module, update in component_updates.items():
            padded = pad_rank(update, ranks[component])
            down, up = reshape_factors(padded, shapes.get(module, ()))
            tensors[f"{component}.{module}.lora_A.weight"] = down
            tensors[f"{component}.{module}.lora_B.weight"] = up
    return tensors


def _kohya_files(
    concepts: Sequence[Adaptation],
    updates: Updates,
    family: Family | None,
    title: str,
    facts: Mapping[str, Any],
) -> dict[str, bytes]:
    name = concepts[0].info.family
    exact = family or _find_published(name, updates)
    model = exact or next((base for base in published_families() if base.name == name), None)
    if model is None or not model.kohya_metadata():
        raise ConceptError(
            f"kohya's layer names of family {name} are unknown",
            fix="write the LoRA with diffusers' keys",
        )
    are_trained_concepts = all(concept.info.fingerprint for concept in concepts)
    if exact is None and (model.kohya_uses_original_names or not are_trained_concepts):
        raise _unpublished_error(name)
    tensors = kohya_tensors(updates, model)
    subjects = [subject for concept in concepts for subject in concept.subjects]
    words = {c.info.name: c.info.trigger_words for c in concepts if not c.subjects}
    words |= {subject.name: subject.name for subject in subjects}
    dates = [c.info.created for c in concepts if isinstance(c, Concept)]
    base = model.kohya_metadata()
    if exact is None:  # a model of another size, for which the other fields are wrong
        base = {"ss_network_module": base["ss_network_module"]}
    facts_json = json.dumps({**facts, "layers": kohya_layer_rows(updates, model)})
    header = kohya_header(
        tensors, base, title=title, words=words, date=max(dates, default=""), facts=facts_json
    )
    header |= subjects_to_header(subjects)
    files = {f"{title}.safetensors": safetensors_bytes(tensors, header)}
    for subject in subjects:
        data = safetensors_bytes(embedding_tensors(subject), {})
        files[f"{KOHYA_EMBEDS_FOLDER}/{subject.name}.safetensors"] = data
    return files


def _find_published(name: str, updates: Updates) -> Family | None:
    """The published model of a family with these layers and shapes, or None."""
    for family in published_families():
        if family.name == name:
            with contextlib.suppress(ConceptError):
                match_to_model(updates, family)
                return family
    return None


def _unpublished_error(name: str) -> ConceptError:
    return ConceptError(
        f"no published model of family {name} has layers of these names and sizes, so that their "
        "names in other programs are unknown",
        fix="call write_merged(..., family=family_of(pipe.components)) with the pipeline, or write "
        "concepts trained with customize with diffusers' keys",
    )


def check_new_folder(folder: Path) -> None:
    """Check that a folder is new or empty, and can be written.

    Raises:
        StorageError: If it is a file or contains files, or cannot be created.
    """
    try:
        is_empty = os.path.isdir(folder) and not any(folder.iterdir())
    except OSError as error:
        raise storage_error(error, folder) from error
    if not is_empty and os.path.lexists(folder):
        raise StorageError(
            "the path exists already and is not an empty folder",
            where=folder,
            fix="choose a new or empty folder",
        )
    check_writable(folder)


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    if _has_same_content(folder, files):
        return
    check_new_folder(folder)
    try:
        with partial_folder(folder) as partial:
            for name, data in files.items():
                (partial / name).parent.mkdir(exist_ok=True)
                write_new_file(partial / name, data)
            if folder.is_dir():
                folder.rmdir()
            partial.rename(folder)
            fsync_folder(folder.parent)
    except OSError as error:
        raise storage_error(error, folder) from error


def _has_same_content(folder: Path, files: Mapping[str, bytes]) -> bool:
    """Whether the folder contains these files, as after an identical merge.

    The text of the model card is not compared, because it differs between versions.
    """
    try:
        existing = {
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        }
        return existing == set(files) and all(
            read_bytes(folder / name, len(data)) == data
            for name, data in files.items()
            if name != CARD_FILE
        )
    except OSError:
        return False


def _compute_updates(
    layers: Mapping[str, Mapping[str, LayerMerge]], rank: int | None
) -> tuple[dict[str, dict[str, LowRank]], float]:
    """The merged updates of at most a rank, and their relative error."""
    updates: dict[str, dict[str, LowRank]] = {}
    squared_error = squared_norm = 0.0
    # Sorted, because the order of layers in a file varies, and with it the rounding of the error.
    for component in sorted(layers):
        updates[component] = {}
        for module, layer in sorted(layers[component].items()):
            exact = layer.compute()
            _check_finite(exact, f"{component}.{module}")
            truncated = layer.truncate(exact)
            if rank is not None:
                truncated = truncate(truncated, rank)
            squared_norm += norm(exact) ** 2
            if truncated is not exact:
                _check_finite(truncated, f"{component}.{module}")
                squared_error += distance(exact, truncated) ** 2
            updates[component][module] = truncated
    return updates, math.sqrt(squared_error / squared_norm) if squared_norm else 0.0


def _check_finite(update: LowRank, where: str) -> None:
    if not (all_finite(update.up) and all_finite(update.down)):
        raise ConfigError(
            "the merged update is not finite",
            where=where,
            fix="choose smaller weights, such as 1",
        )


def _base(concepts: Sequence[Adaptation]) -> str:
    """The base of a trained concept, which can be loaded; else the name in a LoRA file."""
    return loadable_base(concepts) or concepts[0].info.base

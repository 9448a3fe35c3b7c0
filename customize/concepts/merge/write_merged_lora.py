"""Many concepts as one ordinary LoRA that stock diffusers loads, with their tokens beside it."""

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
from customize.concepts.io import model_card
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
from customize.concepts.tokens.subjects import check_subjects, subjects_to_header
from customize.concepts.types import Adaptation, Concept
from customize.core.lowrank import LowRank, all_finite, distance, norm, pad_rank
from customize.core.scalars import is_integer
from customize.core.truncation import truncate
from customize.errors import ConceptError, ConfigError, StorageError, storage_error
from customize.families import Family, published_families
from customize.safe_read import read_bytes
from customize.text import escape_markdown, markdown_code, quote

Products = Mapping[str, Mapping[str, LowRank]]


@dataclass(frozen=True)
class MergeResult:
    """What a merged folder holds.

    Attributes:
        rank: of every layer of each component: the largest needed, others are filled with zeros.
        method: by which it was merged.
        error: what truncation lost: the norm of the difference over the norm of the exact merge;
            0 without truncation.
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
    """Write the weighted merge of concepts as one LoRA, and the tokens of each.

    The folder gets ``pytorch_lora_weights.safetensors`` for ``pipe.load_lora_weights(folder)``
    (alpha equals the rank, so loaders multiply by 1; a second denoiser's in a file of their own, as
    for a concept), ``learned_embeds_<name>.safetensors`` for
    ``pipe.load_textual_inversion`` (the mean, where each cross-attention layer has its own),
    ``merged.json`` and ``README.md``. It is written whole or not at all.

    By kohya's keys the LoRA is ``<folder>.safetensors``, with ranks that may differ between
    layers, and the tokens are ``embeddings/<name>.safetensors``, since ComfyUI and the web UIs
    call a token by its file's name. They are not bundled into the LoRA as ``bundle_emb``
    keys, which only some of the web UIs read, and over which diffusers refuses the file.

    The LoRA's header has the tokens as well, one for each layer too where the concept has those, so
    that either of the files is read again whole, triggers included
    (:mod:`customize.concepts.formats.merged_lora`).

    Args:
        method, settings, inputs: as :func:`plan_merge` takes
        them. rank: the most that any layer may have; None: ranks add up, which is exact but where
            the method prunes.
        layout: one of :data:`customize.concepts.io.file_layout.KEY_LAYOUTS`.
        family: a model with these layers, for what the products alone do not say; None for the
            published one that has them.

    Raises:
        ConceptError, ConfigError: see :func:`plan_merge`; or
            two concepts have one trigger; or the rank is below 1; or a weight is so large that the
            sum is not finite; or there is no published model with these layers, where one is
            needed.
        StorageError: the folder holds anything else than just this, or cannot be written.
    """
    folder = Path(folder)
    check_compatible(concepts)
    subjects = [subject for concept in concepts for subject in concept.subjects]
    check_subjects(subjects)
    check_has_no_vectors(concepts)
    if rank is not None and not is_integer(rank):
        raise ConfigError(
            f"a merged LoRA cannot have rank {quote(rank)}",
            where="rank",
            fix="give a whole number from 1",
        )
    settings = settings or {}
    products, error = _narrow(plan_merge(concepts, weights, method, inputs, **settings), rank)
    if not products:
        raise ConfigError("with these weights nothing is left", where="weights")
    # Sorted, because the order of a file's tensors differs from one reading to the next, and the
    # same merge must give the same bytes.
    ranks = {c: max(p.rank for p in products[c].values()) for c in sorted(products)}
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
        files = _kohya_files(concepts, products, family, folder.name, facts)
        text = _kohya_card(concepts, weights, method, folder.name)
    else:
        # Only LoRAs from elsewhere have convolutions, whose kernels the products do not show.
        elsewhere = any(not isinstance(concept, Concept) for concept in concepts)
        model = family
        if family is None and elsewhere:
            model = _published(concepts[0].info.family, products)
            if model is None and any(not concept.info.fingerprint for concept in concepts):
                raise _unpublished(concepts[0].info.family)
        tensors = _diffusers_tensors(products, ranks, model)
        header = {MERGED_HEADER: json.dumps(facts), **subjects_to_header(subjects)}
        # The first denoiser's is left out where only the second one changes.
        parts = {name: own for name, own in split_lora_files(tensors).items() if own}
        files = {name: safetensors_bytes(own, header) for name, own in parts.items()}
        for subject in subjects:
            files[MERGED_EMBEDS_FILE.format(subject.name)] = safetensors_bytes(
                embedding_tensors(subject), {}
            )
        text = _card(concepts, weights, method)
    files[MERGED_FILE] = (json.dumps(facts, indent=2) + "\n").encode()
    files[CARD_FILE] = text.encode()
    _write(folder, files)
    return MergeResult(folder, ranks, error, method)


def _diffusers_tensors(
    products: Products, ranks: Mapping[str, int], family: Family | None
) -> dict[str, torch.Tensor]:
    tensors = {}
    for component, own in products.items():
        shapes = weight_shapes(family, component) if family is not None else {}
        for module, update in own.items():
            whole = pad_rank(update, ranks[component])
            down, up = reshape_factors(whole, shapes.get(module, ()))
            tensors[f"{component}.{module}.lora_A.weight"] = down
            tensors[f"{component}.{module}.lora_B.weight"] = up
    return tensors


def _kohya_files(
    concepts: Sequence[Adaptation],
    products: Products,
    family: Family | None,
    title: str,
    facts: Mapping[str, Any],
) -> dict[str, bytes]:
    name = concepts[0].info.family
    exact = family or _published(name, products)
    model = exact or next((each for each in published_families() if each.name == name), None)
    if model is None or not model.kohya_metadata():
        raise ConceptError(
            f"what kohya's programs call the layers of family {name} is not known here",
            fix="write it by diffusers' keys",
        )
    ours = all(concept.info.fingerprint for concept in concepts)
    if exact is None and (model.kohya_uses_original_names or not ours):
        raise _unpublished(name)
    tensors = kohya_tensors(products, model)
    subjects = [subject for concept in concepts for subject in concept.subjects]
    words = {c.info.name: c.info.trigger_words for c in concepts if not c.subjects}
    words |= {subject.name: subject.name for subject in subjects}
    dates = [c.info.created for c in concepts if isinstance(c, Concept)]
    base = model.kohya_metadata()
    if exact is None:  # a size of its own: its layers have their own names, and its base none
        base = {"ss_network_module": base["ss_network_module"]}
    told = json.dumps({**facts, "layers": kohya_layer_rows(products, model)})
    header = kohya_header(
        tensors, base, title=title, words=words, date=max(dates, default=""), facts=told
    )
    header |= subjects_to_header(subjects)
    files = {f"{title}.safetensors": safetensors_bytes(tensors, header)}
    for subject in subjects:
        data = safetensors_bytes(embedding_tensors(subject), {})
        files[f"{KOHYA_EMBEDS_FOLDER}/{subject.name}.safetensors"] = data
    return files


def _published(name: str, products: Products) -> Family | None:
    """The published model that has these layers in these shapes, if there is one."""
    for family in published_families():
        if family.name == name:
            with contextlib.suppress(ConceptError):
                match_to_model(products, family)
                return family
    return None


def _unpublished(name: str) -> ConceptError:
    return ConceptError(
        f"no published model of family {name} has layers of these names and sizes, so what other "
        "programs call them is not known",
        fix="call write_merged(..., family=family_of(pipe.components)) with the pipeline, or write "
        "concepts of our own by diffusers' keys",
    )


def check_new_folder(folder: Path) -> None:
    """Refuse a place that holds anything or cannot be written.

    Raises:
        StorageError: it is a file or a folder with files, or not to be made.
    """
    try:
        empty = os.path.isdir(folder) and not any(folder.iterdir())
    except OSError as error:
        raise storage_error(error, folder) from error
    if not empty and os.path.lexists(folder):
        raise StorageError(
            "something else is there already", where=folder, fix="choose a new or empty folder"
        )
    check_writable(folder)


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    if _holds(folder, files):
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


def _holds(folder: Path, files: Mapping[str, bytes]) -> bool:
    """Whether just these files are there already, as after the same merge before."""
    try:
        found = {
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        }
        return found == set(files) and all(
            read_bytes(folder / name, len(data)) == data for name, data in files.items()
        )
    except OSError:
        return False


def _narrow(
    layers: Mapping[str, Mapping[str, LayerMerge]], rank: int | None
) -> tuple[dict[str, dict[str, LowRank]], float]:
    """The merged updates of at most the rank, and what was lost, as in :class:`MergeResult`."""
    products: dict[str, dict[str, LowRank]] = {}
    lost = whole = 0.0
    for component, own in layers.items():
        products[component] = {}
        for module, layer in own.items():
            exact = layer.compute()
            _check_finite(exact, f"{component}.{module}")
            near = layer.truncate(exact)
            if rank is not None:
                near = truncate(near, rank)
            whole += norm(exact) ** 2
            if near is not exact:
                _check_finite(near, f"{component}.{module}")
                lost += distance(exact, near) ** 2
            products[component][module] = near
    return products, math.sqrt(lost / whole) if whole else 0.0


def _check_finite(update: LowRank, where: str) -> None:
    if not (all_finite(update.up) and all_finite(update.down)):
        raise ConfigError(
            "the merged update is not finite",
            where=where,
            fix="choose weights of an ordinary size, such as 1",
        )


def _card_head(
    concepts: Sequence[Adaptation], weights: Sequence[Weight], method: str, library: str
) -> list[str]:
    infos = [concept.info for concept in concepts]
    rows = [
        f"| {info.name} | {markdown_code(info.trigger_words)} | {escape_markdown(info.class_word)} "
        f"| {weight:g} |"
        for info, weight in zip(infos, weights, strict=True)
    ]
    base = _loaded_base(concepts)
    return [
        "---",
        *([f"base_model: {json.dumps(base)}"] if base else []),
        f"library_name: {library}",
        f"tags: [{model_card.card_tags(model_card.pipeline_output(concepts[0]))}]",
        "---",
        f"# {' + '.join(info.name for info in infos)}",
        "",
        f"Concepts that were learned apart, merged by {method} into one ordinary LoRA.",
        "",
        "| Concept | Trigger | What it is | Weight |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


def _base(concepts: Sequence[Adaptation]) -> str:
    """That of our own concepts, whose base is one to load; else what a LoRA's file says."""
    return _loaded_base(concepts) or concepts[0].info.base


def _loaded_base(concepts: Sequence[Adaptation]) -> str:
    """The base by the name that loads it; empty where all are LoRAs from elsewhere, whose files
    name an architecture or a checkpoint at best."""
    return next((c.info.base for c in concepts if isinstance(c, Concept)), "")


def _kohya_card(
    concepts: Sequence[Adaptation], weights: Sequence[Weight], method: str, title: str
) -> str:
    with_tokens = [subject.name for concept in concepts for subject in concept.subjects]
    tokens = [
        f"- `{KOHYA_EMBEDS_FOLDER}/`: its files go where the program keeps textual inversion "
        "embeddings. "
        f"A prompt then says `{name}` in the web UIs, and `embedding:{name}` in ComfyUI."
        for name in with_tokens[:1]
    ]
    head = _card_head(concepts, weights, method, "kohya")
    file = markdown_code(f"{title}.safetensors")
    lora = f"- {file}: goes where the program keeps LoRAs. Load it at strength 1."
    return "\n".join([*head, lora, *tokens, ""])


def _card(concepts: Sequence[Adaptation], weights: Sequence[Weight], method: str) -> str:
    subjects = [model_card.diffusers_subject(concept) for concept in concepts]
    base, family = json.dumps(_loaded_base(concepts) or "BASE"), concepts[0].info.family
    loading = [
        line
        for concept in concepts
        for subject in concept.subjects
        for line in model_card.token_loading_code(
            subject, family, MERGED_EMBEDS_FILE.format(subject.name)
        )
    ]
    prompt = "a photo of " + " and ".join(subject for subject in subjects if subject)
    return "\n".join(
        [
            *_card_head(concepts, weights, method, "diffusers"),
            "```python",
            *model_card.import_code(loading),
            *model_card.base_loading_code(family, base),
            *model_card.lora_loading_code(concepts),
            *loading,
            model_card.inference_code(family, prompt, model_card.pipeline_output(concepts[0])),
            "```",
            "",
        ]
    )

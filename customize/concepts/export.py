"""Many concepts as one ordinary LoRA that stock diffusers loads, with their tokens beside it."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from customize.concepts import card
from customize.concepts.concept import Concept
from customize.concepts.files import (
    check_writable,
    safetensors_bytes,
    storage_error,
    sync_folder,
    write_file,
)
from customize.concepts.layout import CARD_FILE, embedding_tensors, lora_files
from customize.concepts.merge import check_together, merge
from customize.core.lowrank import LowRank, distance, norm, truncate
from customize.errors import ConceptError, ConfigError, StorageError

MERGED_FILE = "merged.json"

Products = Mapping[str, Mapping[str, LowRank]]


@dataclass(frozen=True)
class Merged:
    """What a merged folder holds.

    Attributes:
        rank: of every layer of each component: the largest needed, others are filled with zeros.
        error: what truncation lost: the norm of the difference over the norm of the exact sum;
            0 without truncation.
    """

    folder: Path
    rank: dict[str, int]
    error: float


def write_merged(
    concepts: Sequence[Concept],
    weights: Sequence[float],
    folder: str | Path,
    *,
    method: str = "sum",
    rank: int | None = None,
) -> Merged:
    """Write the weighted merge of concepts as one LoRA, and the tokens of each.

    The folder gets ``pytorch_lora_weights.safetensors`` for ``pipe.load_lora_weights(folder)``
    (alpha equals the rank, so loaders multiply by 1; a second denoiser's in a file of their own, as
    for a concept), ``learned_embeds_<name>.safetensors`` for
    ``pipe.load_textual_inversion`` (the mean, where each cross-attention layer has its own),
    ``merged.json`` and ``README.md``. It is written whole or not at all.

    Args:
        method: a name in :data:`customize.core.lowrank.MERGES`.
        rank: the most that any layer may have; None: exact, ranks add up.

    Raises:
        ConceptError, ConfigError: see :func:`customize.concepts.merge.merge`; or two concepts
            have one trigger; or the rank is below 1; or a weight is so large that the sum is
            not finite.
        StorageError: the folder holds anything else than just this, or cannot be written.
    """
    folder = Path(folder)
    check_together(concepts)
    triggers: dict[str, str] = {}
    for concept in concepts:
        info = concept.info
        if info.trigger in triggers:
            raise ConceptError(
                f"the concepts {triggers[info.trigger]} and {info.name} have the same trigger "
                f"{info.trigger}",
                fix="learn one of them again with another trigger",
            )
        triggers[info.trigger] = info.name
    exact = merge(concepts, weights, method)
    products: Products = exact
    error = 0.0
    _check_finite(exact)
    if rank is not None:
        products = {c: {m: truncate(p, rank) for m, p in own.items()} for c, own in exact.items()}
        error = _relative_error(exact, products)
        _check_finite(products)
    # Sorted, because the order of a file's tensors differs from one reading to the next, and the
    # same merge must give the same bytes.
    ranks = {c: max(p.rank for p in products[c].values()) for c in sorted(products)}
    tensors = {}
    for component, own in products.items():
        for module, update in own.items():
            up, down = _filled(update, ranks[component])
            tensors[f"{component}.{module}.lora_A.weight"] = down
            tensors[f"{component}.{module}.lora_B.weight"] = up
    facts = {
        "base": concepts[0].info.base,
        "family": concepts[0].info.family,
        "method": method,
        "rank": ranks,
        "truncation_error": error,
        "concepts": [
            {
                "name": concept.info.name,
                "trigger": concept.info.trigger,
                "class_word": concept.info.class_word,
                "weight": weight,
            }
            for concept, weight in zip(concepts, weights, strict=True)
        ],
    }
    files = {name: safetensors_bytes(own, {}) for name, own in lora_files(tensors).items()}
    for concept in concepts:
        if concept.embeddings:
            files[_embeds_file(concept)] = safetensors_bytes(embedding_tensors(concept), {})
    files[MERGED_FILE] = (json.dumps(facts, indent=2) + "\n").encode()
    files[CARD_FILE] = _card(concepts, weights, method).encode()
    _write(folder, files)
    return Merged(folder, ranks, error)


def check_new(folder: Path) -> None:
    """Refuse a place that holds anything or cannot be written.

    Raises:
        StorageError: it is a file or a folder with files, or not to be made.
    """
    empty = os.path.isdir(folder) and not any(folder.iterdir())
    if not empty and os.path.lexists(folder):
        raise StorageError(
            "something else is there already", where=folder, fix="choose a new or empty folder"
        )
    check_writable(folder)


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    if _holds(folder, files):
        return
    check_new(folder)
    partial = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir(parents=True)
        for name, data in files.items():
            write_file(partial / name, data)
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise storage_error(error, folder) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _holds(folder: Path, files: Mapping[str, bytes]) -> bool:
    """Whether just these files are there already, as after the same merge before."""
    try:
        found = {path.name for path in folder.iterdir()}
        return found == set(files) and all((folder / n).read_bytes() == files[n] for n in files)
    except OSError:
        return False


def _filled(update: LowRank, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors with the scale in the up-projection, and zeros up to the rank."""
    missing = rank - update.rank
    up = torch.nn.functional.pad(update.up * update.scale, (0, missing))
    return up.contiguous(), torch.nn.functional.pad(update.down, (0, 0, 0, missing)).contiguous()


def _check_finite(products: Products) -> None:
    for component, own in products.items():
        for module, update in own.items():
            factors = _filled(update, update.rank)
            if not all(bool(torch.isfinite(factor).all()) for factor in factors):
                raise ConfigError(
                    "the merged update is not finite",
                    where=f"{component}.{module}",
                    fix="choose weights of an ordinary size, such as 1",
                )


def _relative_error(exact: Products, near: Products) -> float:
    pairs = [(p, near[c][m]) for c, own in exact.items() for m, p in own.items()]
    whole = math.sqrt(sum(norm(p) ** 2 for p, _ in pairs))
    return math.sqrt(sum(distance(p, q) ** 2 for p, q in pairs)) / whole if whole else 0.0


def _embeds_file(concept: Concept) -> str:
    return f"learned_embeds_{concept.info.name}.safetensors"


def _card(concepts: Sequence[Concept], weights: Sequence[float], method: str) -> str:
    infos = [concept.info for concept in concepts]
    subjects = [card.stock_subject(concept) for concept in concepts]
    base = json.dumps(infos[0].base)
    rows = [
        f"| {info.name} | `{info.trigger}` | {info.class_word.replace('|', '/')} | {weight:g} |"
        for info, weight in zip(infos, weights, strict=True)
    ]
    loading = [
        line for concept in concepts for line in card.stock_tokens(concept, _embeds_file(concept))
    ]
    return "\n".join(
        [
            "---",
            f"base_model: {base}",
            "library_name: diffusers",
            f"tags: [{card.tags(infos[0].family)}]",
            "---",
            f"# {' + '.join(info.name for info in infos)}",
            "",
            f"Concepts that were learned apart, merged by {method} into one ordinary LoRA.",
            "",
            "| Concept | Trigger | What it is | Weight |",
            "|---|---|---|---|",
            *rows,
            "",
            "```python",
            *card.imports(loading),
            *card.opening(infos[0].family, base),
            *card.stock_updates(concepts),
            *loading,
            card.drawing(infos[0].family, f"a photo of {' and '.join(subjects)}"),
            "```",
            "",
        ]
    )

"""Concepts for tests, made by hand or taken from a tiny pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from customize.concepts.adapter import Adapter, attach_new_adapter
from customize.concepts.concept_info import BasisInfo, ConceptInfo
from customize.concepts.slices.allocation import slice_columns
from customize.concepts.tokens.token_rows import add_tokens, initial_rows, vocabulary_entries
from customize.concepts.types import Concept
from customize.core.bases import BASES, down_projection
from customize.core.lowrank import LowRank
from customize.families import family_of
from customize.families.family import Family


def facts(**changes: Any) -> ConceptInfo:
    values: dict[str, Any] = {
        "name": "rex",
        "trigger": "<rex>",
        "class_word": "dog",
        "family": "sd",
        "base": "some/base",
        "fingerprint": {"family": "sd", "denoiser": "abc", "widths": {"unet": [6, 8]}},
        "basis": BasisInfo(seed=3),
        "rank": 2,
        "alpha": 2.0,
        "slices": {"6": [2, 3], "8": [0, 1]},
        "num_tokens": 2,
        "training": {"steps": 10, "lr": 1e-3, "flags": [True, None]},
        "scores": {"identity": 0.75},
    }
    return ConceptInfo(**values | changes)


def small(seed: int = 0, **changes: Any) -> Concept:
    """A concept of three small layers, whose numbers depend on the seed."""
    info = facts(**changes)
    generator = torch.Generator().manual_seed(seed)

    def update(out: int, width: int) -> LowRank:
        up = torch.randn(out, info.rank, generator=generator)
        if info.basis is None:
            return LowRank(up, torch.randn(info.rank, width, generator=generator), info.scale)
        columns = info.slices[str(width)]
        down = down_projection(BASES[info.basis.kind], width, columns, info.basis.seed)
        return LowRank(up, down, info.scale)

    products = {
        "unet": {"mid.attn1.to_q": update(8, 8), "mid.attn2.to_out.0": update(5, 6)},
        "text_encoder": {"text_model.encoder.layers.0.self_attn.q_proj": update(6, 6)},
    }
    rows = torch.randn(info.num_tokens, 6, generator=generator)
    return Concept(info, products, {"text_encoder": rows} if info.num_tokens else {})


def same_tensors(a: Concept, b: Concept) -> bool:
    def tensors_by_key(concept: Concept) -> dict[tuple[str, ...], torch.Tensor]:
        tensors = {("rows", key): rows for key, rows in concept.embeddings.items()}
        for component, updates in concept.updates.items():
            for module, update in updates.items():
                tensors[component, module, "up"] = update.up
                tensors[component, module, "down"] = update.down
        return tensors

    left, right = tensors_by_key(a), tensors_by_key(b)
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def learn(
    pipe: DiffusionPipeline, *, name: str = "rex", alpha: float = 4.0, method: Any = "orthogonal"
) -> tuple[Family, Adapter, Concept]:
    """Attach a concept with strong random updates and two tokens to a live pipeline."""
    family = family_of(pipe.components)
    components = [*family.denoisers, *family.text_encoders]
    widths = {shape[1] for c in components for shape in family.adapter_targets(c).values()}
    basis = BasisInfo() if method == "orthogonal" else None
    columns = slice_columns(widths, 4, index=0, name=name) if basis else {}
    adapter = attach_new_adapter(
        family,
        method=method,
        rank=4,
        alpha=alpha,
        basis=basis,
        columns=columns,
        components=components,
        name=name,
    )
    generator = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for parameters in adapter.parameters().values():
            for parameter in parameters:
                parameter += torch.randn(parameter.shape, generator=generator)
    rows = {}
    for number, dictionary in enumerate(family.token_dictionaries()):
        rows[dictionary.key] = 5 * initial_rows(dictionary, "dog", 2, seed=number)
        add_tokens(dictionary, vocabulary_entries(f"<{name}>", 2), rows[dictionary.key])
    info = ConceptInfo(
        name=name,
        trigger=f"<{name}>",
        class_word="dog",
        family=family.name,
        base="tiny",
        fingerprint=family.fingerprint(),
        method=method,
        basis=basis,
        rank=4,
        alpha=alpha,
        slices={str(width): list(slice_) for width, slice_ in columns.items()},
        num_tokens=2 if rows else 0,
    )
    return family, adapter, Concept(info, adapter.updates(), rows)

"""Writing a LoRA by kohya's keys, which ComfyUI and the web UIs read, with the header they show.

A key is ``lora_unet_`` or ``lora_te1_`` and the like, then the layer's name with underscores for
dots, in the names of those who made the model where kohya trains their code. What such a model
computes in one layer and diffusers in several is put together again, exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from customize.concepts.files import safetensors_bytes
from customize.core.lowrank import LowRank, rows, stacked
from customize.errors import ConceptError
from customize.families import Family
from customize.families.originals import Rows

Products = Mapping[str, Mapping[str, LowRank]]


def kohya_tensors(products: Products, family: Family) -> dict[str, Tensor]:
    """Every update by kohya's keys: ``lora_down``, ``lora_up`` and ``alpha``.

    Args:
        products: component -> module, as files name it -> update.
        family: a model that has these layers, with or without weights.

    Returns:
        Sorted by key. Ranks may differ between layers; alpha / rank is an update's scale.
    """
    tensors: dict[str, Tensor] = {}
    for component, own in sorted(products.items()):
        shapes = family.weight_shapes(component)
        named = {name.removeprefix("text_model."): update for name, update in own.items()}
        prefix = _prefix(family, component)
        for name, members in sorted(_file_layers(family, component, named).items()):
            update, module = _put_together(members, named, shapes), members[0].module
            down, up = factors(update, shapes[module])
            key = f"{prefix}_{name.replace('.', '_')}"
            tensors[f"{key}.alpha"] = torch.tensor(update.scale * update.rank)
            tensors[f"{key}.lora_down.weight"] = down
            tensors[f"{key}.lora_up.weight"] = up
    return dict(sorted(tensors.items()))


def factors(update: LowRank, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(down, up) in the shapes of the layer that they are for: of a convolution, with its kernel.

    Args:
        shape: of the layer's weight.
    """
    sides = [1] * (len(shape) - 2)
    down = update.down.reshape(update.rank, *shape[1:]).contiguous()
    return down, update.up.reshape(shape[0], update.rank, *sides).contiguous()


def kohya_header(
    tensors: Mapping[str, Tensor],
    family: Family,
    *,
    title: str,
    words: Mapping[str, str],
    date: str,
    facts: str,
) -> dict[str, str]:
    """The header of a file with these tensors, by kohya's names and those of Stability's spec.

    Args:
        words: concept's name -> what a prompt says to mean it; empty where nothing need be said.
        date: ISO 8601.
        facts: JSON of our own, kept under ``customize_merged``.
    """
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if key.endswith("lora_down.weight")}
    alphas = {f"{float(tensor):g}" for key, tensor in tensors.items() if key.endswith(".alpha")}
    said = [word for word in words.values() if word]
    training = {
        # As kohya's own merges have it, where layers differ.
        "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(*alphas) if len(alphas) == 1 else "Dynamic",
        "ss_output_name": title,
        "ss_tag_frequency": json.dumps({name: {word: 1} for name, word in words.items() if word}),
        **{key: value for key, value in family.kohya_metadata().items() if key.startswith("ss_")},
    }
    spec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": title,
        "modelspec.date": date,
        **{key: v for key, v in family.kohya_metadata().items() if key.startswith("modelspec.")},
        **({"modelspec.trigger_phrase": ", ".join(said)} if said else {}),
    }
    hashes = _hashes(tensors, training)
    return {**training, **hashes, **spec, "customize_merged": facts}


def _hashes(tensors: Mapping[str, Tensor], training: Mapping[str, str]) -> dict[str, str]:
    """By which web UIs know a file: of what follows the header, and the older one of 64 KiB."""
    data = safetensors_bytes(tensors, training, None)
    start = 8 + int.from_bytes(data[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(data[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
    }


def _prefix(family: Family, component: str) -> str:
    if component == family.denoiser_key:
        return "lora_unet"
    clips = list(family.clip_encoders)
    number = clips.index(component) + 1
    # Stable Diffusion has one text encoder and no number; FLUX counts its T5.
    return "lora_te" if clips == [component] and not family.other_encoders else f"lora_te{number}"


def _file_layers(
    family: Family, component: str, named: Mapping[str, LowRank]
) -> dict[str, tuple[Rows, ...]]:
    """Name in the file -> the rows of our layers that it stands for."""
    found: dict[str, tuple[Rows, ...]] = {}
    covered: set[str] = set()
    if component == family.denoiser_key and family.kohya_uses_original_names:
        for original, members in family.original_names().items():
            modules = {each.module for each in members}
            # Later names for layers that had one already are those of other programs.
            if modules & named.keys() and not modules & covered:
                found[original] = members
                covered |= modules
    shapes = family.layers(component)
    plain = component != family.denoiser_key
    for module in named:
        if module in covered:
            continue
        ours = next((m for m in (module, f"text_model.{module}") if m in shapes), None)
        if ours is None:
            raise ConceptError(
                f"the model of family {family.name} has no such layer",
                where=f"{component}.{module}",
                fix="write diffusers' keys instead",
            )
        name = f"text_model.{module}" if plain and module.startswith("encoder.") else module
        found[name] = (Rows(ours, 0, shapes[ours][0]),)
    return found


def _put_together(
    members: Iterable[Rows], named: Mapping[str, LowRank], shapes: Mapping[str, Sequence[int]]
) -> LowRank:
    parts = []
    members = list(members)
    known = {each.module: named.get(each.module.removeprefix("text_model.")) for each in members}
    some = next(update for update in known.values() if update is not None)
    for each in members:
        update = known[each.module]
        if update is None:  # left alone: zeros, that cost no rank
            zeros = some.up.new_zeros(shapes[each.module][0], some.rank)
            update = LowRank(zeros, some.down)
        parts.append(rows(update, each.start, each.stop))
    return parts[0] if len(parts) == 1 else stacked(parts)

"""Tensors and header of a LoRA with kohya's keys, which ComfyUI and the web UIs read.

A key is a prefix, such as ``lora_unet_`` or ``lora_te1_``, and the layer's name with underscores
for dots; for models that kohya trains with the original code, in the names of that code. Layers
that diffusers splits are joined again, exactly.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from customize.concepts.adapter import saved_module_name
from customize.concepts.io.data_files import safetensors_bytes
from customize.core.lowrank import LowRank, pad_rank, slice_rows, stack_rows
from customize.families import Family
from customize.families.original_layer_names import RowRange

Updates = Mapping[str, Mapping[str, LowRank]]


def kohya_tensors(component_updates: Updates, family: Family) -> dict[str, Tensor]:
    """The tensors ``lora_down``, ``lora_up`` and ``alpha`` of each layer, by kohya's keys.

    Args:
        component_updates: Component -> module name in files -> update (out, in * kernel).
        family: A model with these layers, with or without weights. If
            :attr:`Family.kohya_uses_original_names` is False and no layer is a convolution, only
            the names of its layers matter.

    Returns:
        Key -> tensor, sorted by key. alpha is the rank, so that programs multiply by 1; ranks
        differ between layers only if some layers of the original are split in diffusers.
    """
    layers: dict[str, tuple[LowRank, Sequence[int]]] = {}
    has_joined_layers = False
    for component, module_updates in component_updates.items():
        updates = {
            saved_module_name(component, module): update
            for module, update in module_updates.items()
        }
        shapes = weight_shapes(family, component)
        prefix = _prefix(family, component)
        for name, members in _file_layers(family, component, updates).items():
            key = f"{prefix}_{name.replace('.', '_')}"
            update = _join_rows(members, updates, shapes)
            layers[key] = update, shapes.get(members[0].module, ())
            has_joined_layers |= len(members) > 1
    # diffusers misreads alphas that differ between layers, except for models whose layers it splits
    # itself. There the ranks differ widely, and padding would make the files large.
    highest = max(update.rank for update, _ in layers.values())
    tensors: dict[str, Tensor] = {}
    for key, (update, shape) in layers.items():
        padded = pad_rank(update, update.rank if has_joined_layers else highest)
        down, up = reshape_factors(padded, shape)
        tensors[f"{key}.alpha"] = torch.tensor(float(padded.rank), dtype=torch.float32)
        tensors[f"{key}.lora_down.weight"] = down
        tensors[f"{key}.lora_up.weight"] = up
    return dict(sorted(tensors.items()))


def kohya_layer_rows(
    component_updates: Updates, family: Family
) -> dict[str, list[tuple[str, str, int, int]]]:
    """The rows of the model's layers that make up each layer of the file, in order.

    Args:
        component_updates: As for :func:`kohya_tensors`.
        family: As for :func:`kohya_tensors`.

    Returns:
        Layer of the file -> (component, module, first row, last row + 1) of each part.
    """
    layer_rows = {}
    for component, module_updates in component_updates.items():
        updates = {
            saved_module_name(component, module): update
            for module, update in module_updates.items()
        }
        prefix = _prefix(family, component)
        for name, members in _file_layers(family, component, updates).items():
            layer_rows[f"{prefix}_{name.replace('.', '_')}"] = [
                (component, rows.module, rows.start, rows.stop) for rows in members
            ]
    return dict(sorted(layer_rows.items()))


def weight_shapes(family: Family, component: str) -> dict[str, tuple[int, ...]]:
    """Weight shapes of a component: module name in files -> shape."""
    shapes = family.weight_shapes(component).items()
    return {saved_module_name(component, module): shape for module, shape in shapes}


def reshape_factors(update: LowRank, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Reshape the factors for a layer: those of a convolution get the shape of its kernel.

    Args:
        update: The update, of rank r.
        shape: Shape of the layer's weight.

    Returns:
        (down, up): (r, in) and (out, r), or (r, in, *kernel) and (out, r, 1, ...).
    """
    if len(shape) == 2 or math.prod(shape[1:]) != update.shape[1]:
        return update.down.contiguous(), update.up.contiguous()
    down = update.down.reshape(update.rank, *shape[1:]).contiguous()
    return down, update.up.reshape(*update.up.shape, *[1] * (len(shape) - 2)).contiguous()


def kohya_header(
    tensors: Mapping[str, Tensor],
    base: Mapping[str, str],
    *,
    title: str,
    words: Mapping[str, str],
    date: str,
    facts: str,
) -> dict[str, str]:
    """The safetensors header, with the fields of kohya and of Stability's ModelSpec.

    Args:
        tensors: The tensors of the file.
        base: Fields that describe the base: :meth:`Family.kohya_metadata`.
        title: Title of the LoRA.
        words: Name of a concept -> its trigger words; empty if it needs none.
        date: ISO 8601; empty if it is unknown.
        facts: Our own JSON, stored under ``customize_merged``.
    """
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if key.endswith("lora_down.weight")}
    alphas = {f"{float(tensor):g}" for key, tensor in tensors.items() if key.endswith(".alpha")}
    triggers = [word for word in words.values() if word]
    training = {
        # kohya's own merges write "Dynamic" where layers differ.
        "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(*alphas) if len(alphas) == 1 else "Dynamic",
        "ss_output_name": title,
        "ss_tag_frequency": json.dumps({name: {word: 1} for name, word in words.items() if word}),
        **{key: value for key, value in base.items() if key.startswith("ss_")},
    }
    spec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": title,
        **({"modelspec.date": date} if date else {}),
        **{key: v for key, v in base.items() if key.startswith("modelspec.")},
        **({"modelspec.trigger_phrase": ", ".join(triggers)} if triggers else {}),
    }
    hashes = _model_hashes(tensors, training)
    return {**training, **hashes, **spec, "customize_merged": facts}


def _model_hashes(tensors: Mapping[str, Tensor], training: Mapping[str, str]) -> dict[str, str]:
    """Hashes that web UIs identify a file by: of all tensor data, and the older one of 64 KiB."""
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
    family: Family, component: str, updates: Mapping[str, LowRank]
) -> dict[str, tuple[RowRange, ...]]:
    """Name in the file -> the rows of the model's layers that it consists of."""
    layers: dict[str, tuple[RowRange, ...]] = {}
    covered: set[str] = set()
    if component == family.denoiser_key and family.kohya_uses_original_names:
        for original, members in family.original_names().items():
            modules = {rows.module for rows in members}
            # Further names of a layer are those of other programs.
            if modules & updates.keys() and not modules & covered:
                layers[original] = members
                covered |= modules
    others = {module: update for module, update in updates.items() if module not in covered}
    return layers | {m: (RowRange(m, 0, update.shape[0]),) for m, update in others.items()}


def _join_rows(
    members: Sequence[RowRange], updates: Mapping[str, LowRank], shapes: Mapping[str, Sequence[int]]
) -> LowRank:
    if len(members) == 1:
        return updates[members[0].module]
    existing = next(updates[rows.module] for rows in members if rows.module in updates)
    parts = []
    for rows in members:
        update = updates.get(rows.module)
        if update is None:  # unchanged: zeros with a shared down-projection add no rank
            zeros = existing.up.new_zeros(shapes[rows.module][0], existing.rank)
            update = LowRank(zeros, existing.down)
        parts.append(slice_rows(update, rows.start, rows.stop))
    return stack_rows(parts)

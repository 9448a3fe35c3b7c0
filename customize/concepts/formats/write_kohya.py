"""Writing a LoRA by kohya's keys, which ComfyUI and the web UIs read, with the header they show.

A key is ``lora_unet_`` or ``lora_te1_`` and the like, then the layer's name with underscores for
dots, in the names of those who made the model where kohya trains their code. What such a model
computes in one layer and diffusers in several is put together again, exactly.
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

Products = Mapping[str, Mapping[str, LowRank]]


def kohya_tensors(products: Products, family: Family) -> dict[str, Tensor]:
    """Every update by kohya's keys: ``lora_down``, ``lora_up`` and ``alpha``.

    Args:
        products: component -> module, as files name it -> update.
        family: a model that has these layers, with or without weights. Only their names need
            agree where :attr:`Family.kohya_uses_original_names` is False and none is a convolution.

    Returns:
        Sorted by key. alpha is the rank, so that programs multiply by 1; ranks differ between
        layers only where some of the original's layers are several here.
    """
    layers: dict[str, tuple[LowRank, Sequence[int]]] = {}
    fused = False
    for component, updates in products.items():
        own = {saved_module_name(component, module): update for module, update in updates.items()}
        shapes = weight_shapes(family, component)
        prefix = _prefix(family, component)
        for name, members in _file_layers(family, component, own).items():
            key = f"{prefix}_{name.replace('.', '_')}"
            update = _join_rows(members, own, shapes)
            layers[key] = update, shapes.get(members[0].module, ())
            fused |= len(members) > 1
    # Stock diffusers misreads alphas that differ between layers, but for the models whose layers
    # it splits itself. There ranks differ much, and filling up would make files large.
    most = max(update.rank for update, _ in layers.values())
    tensors: dict[str, Tensor] = {}
    for key, (update, shape) in layers.items():
        whole = pad_rank(update, update.rank if fused else most)
        down, up = reshape_factors(whole, shape)
        tensors[f"{key}.alpha"] = torch.tensor(float(whole.rank), dtype=torch.float32)
        tensors[f"{key}.lora_down.weight"] = down
        tensors[f"{key}.lora_up.weight"] = up
    return dict(sorted(tensors.items()))


def kohya_layer_rows(
    products: Products, family: Family
) -> dict[str, list[tuple[str, str, int, int]]]:
    """Which rows of the model's layers the rows of a file's layer are, from its first one on.

    Args:
        products, family: as for :func:`kohya_tensors`.

    Returns:
        The file's layer -> (component, module, first row, last row + 1) of each.
    """
    found = {}
    for component, updates in products.items():
        own = {saved_module_name(component, module): update for module, update in updates.items()}
        prefix = _prefix(family, component)
        for name, members in _file_layers(family, component, own).items():
            places = [(component, each.module, each.start, each.stop) for each in members]
            found[f"{prefix}_{name.replace('.', '_')}"] = places
    return dict(sorted(found.items()))


def weight_shapes(family: Family, component: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a component's weights, by the names that files give its layers."""
    shapes = family.weight_shapes(component).items()
    return {saved_module_name(component, module): shape for module, shape in shapes}


def reshape_factors(update: LowRank, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(down, up) in the shapes of the layer that they are for: of a convolution, with its kernel.

    Args:
        shape: of a convolution's weight; any other leaves the factors as they are.
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
    """The header of a file with these tensors, by kohya's names and those of Stability's spec.

    Args:
        base: what is noted on the base: :meth:`Family.kohya_metadata`.
        words: concept's name -> what a prompt says to mean it; empty where nothing need be said.
        date: ISO 8601; empty where it is not known.
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
        **{key: value for key, value in base.items() if key.startswith("ss_")},
    }
    spec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": title,
        **({"modelspec.date": date} if date else {}),
        **{key: v for key, v in base.items() if key.startswith("modelspec.")},
        **({"modelspec.trigger_phrase": ", ".join(said)} if said else {}),
    }
    hashes = _model_hashes(tensors, training)
    return {**training, **hashes, **spec, "customize_merged": facts}


def _model_hashes(tensors: Mapping[str, Tensor], training: Mapping[str, str]) -> dict[str, str]:
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
    family: Family, component: str, own: Mapping[str, LowRank]
) -> dict[str, tuple[RowRange, ...]]:
    """Name in the file -> the rows of our layers that it stands for."""
    found: dict[str, tuple[RowRange, ...]] = {}
    covered: set[str] = set()
    if component == family.denoiser_key and family.kohya_uses_original_names:
        for original, members in family.original_names().items():
            modules = {each.module for each in members}
            # Later names for layers that had one already are those of other programs.
            if modules & own.keys() and not modules & covered:
                found[original] = members
                covered |= modules
    rest = {module: update for module, update in own.items() if module not in covered}
    return found | {m: (RowRange(m, 0, update.shape[0]),) for m, update in rest.items()}


def _join_rows(
    members: Sequence[RowRange], own: Mapping[str, LowRank], shapes: Mapping[str, Sequence[int]]
) -> LowRank:
    if len(members) == 1:
        return own[members[0].module]
    some = next(own[each.module] for each in members if each.module in own)
    parts = []
    for each in members:
        update = own.get(each.module)
        if update is None:  # left alone: zeros, that cost no rank
            update = LowRank(some.up.new_zeros(shapes[each.module][0], some.rank), some.down)
        parts.append(slice_rows(update, each.start, each.stop))
    return stack_rows(parts)

"""Updates of biases and norms, which adapter files store beside the updates of weight matrices.

LyCORIS and ComfyUI store ``diff_b`` for the bias of a layer, and ``w_norm`` and ``b_norm`` (or
``diff`` and ``diff_b``) for a norm; these are added to the base. peft with ``lora_bias=True``
stores the bias of the up-projection in ``lora_B.bias``, which is scaled like the update. With
peft's ``bias="all"``, and in FLUX's ``query_norm.scale``, the values replace those of the base.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from customize.concepts.formats.tensor_group import TensorGroup
from customize.concepts.types import VectorUpdate
from customize.core.lowrank import all_finite
from customize.errors import ConceptError
from customize.families.family import Family
from customize.families.original_layer_names import RowRange
from customize.families.pipeline_components import uncompiled

#: Part that changes a bias or norm -> suffixes of its keys; ``*`` stands for a peft adapter's name.
VECTOR_KEY_SUFFIXES: dict[str, tuple[str, ...]] = {
    "diff_b": (".diff_b",),
    "w_norm": (".w_norm",),
    "b_norm": (".b_norm",),
    "down_bias": (".lora_A.bias", ".lora_A.*.bias", ".lora_down.bias"),
    "up_bias": (".lora_B.bias", ".lora_B.*.bias", ".lora_up.bias"),
    "bias": (".base_layer.bias", ".bias"),
    "norm_scale": (".scale",),
}
_INSIDE_ADAPTER = re.compile(r"(^|\.)(base_layer|lora_[A-Za-z_]+)(\.|$)")
# Family -> pattern of a norm's name in diffusers -> its name in the original code.
_ORIGINAL_NORM_NAMES = {
    "wan": {
        r"blocks\.(\d+)\.norm2": r"blocks.\1.norm3",
        r"blocks\.(\d+)\.attn1\.norm_([qk])": r"blocks.\1.self_attn.norm_\2",
        r"blocks\.(\d+)\.attn2\.norm_([qk])": r"blocks.\1.cross_attn.norm_\2",
        r"blocks\.(\d+)\.attn2\.norm_added_k": r"blocks.\1.cross_attn.norm_k_img",
    },
    "flux": {
        rf"transformer_blocks\.(\d+)\.attn\.norm_{added}{short}": rf"double_blocks.\1.{side}_attn."
        rf"norm.{long}_norm"
        for added, side in (("", "img"), ("added_", "txt"))
        for short, long in (("q", "query"), ("k", "key"))
    }
    | {
        rf"single_transformer_blocks\.(\d+)\.attn\.norm_{short}": rf"single_blocks.\1.norm."
        rf"{long}_norm"
        for short, long in (("q", "query"), ("k", "key"))
    },
}


def has_only_vectors(group: TensorGroup) -> bool:
    """Whether a layer has updates of a bias or norm, and no update of a matrix."""
    return not remove_vectors(group).parts.keys() - {"alpha"} and bool(_vector_parts(group))


def remove_vectors(group: TensorGroup) -> TensorGroup:
    """The same group without updates of biases and norms."""
    parts = _vector_parts(group)
    if not parts:
        return group
    return replace(group, parts={k: v for k, v in group.parts.items() if k not in parts})


def _vector_parts(group: TensorGroup) -> set[str]:
    parts = set(group.parts.keys() & VECTOR_KEY_SUFFIXES.keys())
    # LyCORIS and ComfyUI use one key for norm weights and for full differences.
    if "diff" in group.parts and group.parts["diff"].ndim == 1:
        parts.add("diff")
    return parts


def decode_vectors(group: TensorGroup, factor: float) -> dict[str, VectorUpdate]:
    """Decode the updates of a layer's "bias" and, for a norm, "weight".

    Args:
        group: The tensors of the layer.
        factor: Scale of the layer's update, for biases of the projections.

    Returns:
        "weight" or "bias" -> update.

    Raises:
        ConceptError: If a tensor is not a finite vector, or two change one parameter.
    """
    updates: dict[str, VectorUpdate] = {}

    def add(parameter: str, part: str, values: Tensor, is_replacement: bool = False) -> None:
        if parameter in updates:
            raise ConceptError(f"{group.keys[part]} and another key change the same {parameter}")
        updates[parameter] = VectorUpdate(values, is_replacement)

    for part in sorted(_vector_parts(group)):
        values = _read_vector(group, part)
        if part in ("w_norm", "diff"):
            add("weight", part, values)
        elif part == "norm_scale":
            add("weight", part, values, is_replacement=True)
        elif part in ("b_norm", "diff_b"):
            add("bias", part, values)
        elif part == "bias":
            add("bias", part, values, is_replacement=True)
        elif part == "up_bias":
            add("bias", part, factor * values + _project_down_bias(group, factor))
        elif "up_bias" not in group.parts:
            add("bias", part, _project_down_bias(group, factor))
    return updates


def split_by_parameter(
    vectors: Mapping[str, VectorUpdate], rows: Sequence[RowRange], is_norm: bool
) -> dict[str, VectorUpdate]:
    """Split updates of a layer by the modules that its rows belong to.

    Args:
        vectors: "weight" or "bias" -> update of (n,) numbers.
        rows: The rows of the model's modules, n in all.
        is_norm: Whether the target is a norm, whose weight is a vector.

    Returns:
        Parameter, such as "blocks.0.norm2.weight" -> update.

    Raises:
        ConceptError: If an update has another width, or the weight is a matrix.
    """
    updates: dict[str, VectorUpdate] = {}
    width = sum(module_rows.stop - module_rows.start for module_rows in rows)
    for kind, vector in vectors.items():
        if kind == "weight" and not is_norm:
            raise ConceptError("a vector cannot update the weight matrix of a layer")
        if len(vector.values) != width:
            raise ConceptError(
                f"an update of {len(vector.values)} numbers does not fit a {kind} of {width}"
            )
        start = 0
        for module_rows in rows:
            stop = start + module_rows.stop - module_rows.start
            name = f"{module_rows.module}.{kind}"
            values, start = vector.values[start:stop], stop
            if name in updates:  # the original has the halves of this layer in the other order
                parts = [updates[name].values, values]
                values = torch.cat(parts if module_rows.start else parts[::-1])
            updates[name] = VectorUpdate(values, vector.is_replacement)
    return updates


def norm_widths(family: Family, component: str) -> dict[str, int]:
    """Modules of a component whose weight is a vector, such as norms: name -> width."""
    model: Any = uncompiled(family.adaptable[component])
    return {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if not _INSIDE_ADAPTER.search(name)
        and isinstance(module._parameters.get("weight"), nn.Parameter)
        and module.weight.ndim == 1
    }


def original_norm_names(
    family: Family, component: str, norms: Mapping[str, int]
) -> Iterator[tuple[str, str]]:
    """(name in the original code, name in diffusers) of norms."""
    if component != family.denoiser_key:
        return
    parents: dict[str, str] = {}
    for original, rows in family.original_names().items():
        module = rows[0].module
        while "." in module and "." in original:
            module, leaf = module.rpartition(".")[::2]
            original, original_leaf = original.rpartition(".")[::2]
            parents.setdefault(module, original)
            if leaf != original_leaf and not leaf.endswith(original_leaf):
                break
    table = _ORIGINAL_NORM_NAMES.get(family.name, {})
    for name in norms:
        parent, _, leaf = name.rpartition(".")
        if parent in parents:
            yield f"{parents[parent]}.{leaf}", name
        for pattern, original in table.items():
            if re.fullmatch(pattern, name):
                yield re.sub(pattern, original, name), name


def _project_down_bias(group: TensorGroup, factor: float) -> Tensor:
    """Project the bias of the down-projection by the up-projection; 0 without one."""
    if "down_bias" not in group.parts:
        return torch.zeros(())
    up = group.parts.get("up")
    if up is None:
        raise ConceptError(f"the layer has {group.keys['down_bias']} and no up-projection")
    down = _read_vector(group, "down_bias")
    if up.flatten(1).shape[1] != len(down):
        raise ConceptError(
            f"{group.keys['down_bias']} of {len(down)} numbers does not fit the rank"
        )
    return factor * (up.flatten(1).float() @ down)


def _read_vector(group: TensorGroup, part: str) -> Tensor:
    values = group.parts[part]
    if not values.is_floating_point() or values.numel() == 0 or values.numel() != max(values.shape):
        raise ConceptError(
            f"{group.keys[part]} of shape {tuple(values.shape)} and type {values.dtype} is not a "
            "vector of numbers"
        )
    if not all_finite(values.float()):
        raise ConceptError(f"{group.keys[part]} has a number that is NaN or infinite")
    return values.flatten().float()

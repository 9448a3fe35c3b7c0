"""Changes of biases and norms, which LoRA files hold beside the updates of weight matrices.

LyCORIS and ComfyUI have ``diff_b`` for a layer's bias, ``w_norm`` and ``b_norm`` (or ``diff`` and
``diff_b``) for a norm: they are added. peft has ``lora_B.bias`` with ``lora_bias=True``: the bias
of the up-projection, which is scaled as the update is. Where peft trained the model's own biases
(``bias="all"``), and in FLUX's ``query_norm.scale``, the values take the place of the base's.
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
# A norm's name in diffusers -> in the files of those who made the model, by family.
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
    """Whether a group changes a bias or a norm alone."""
    return not remove_vectors(group).parts.keys() - {"alpha"} and bool(_vector_parts(group))


def remove_vectors(group: TensorGroup) -> TensorGroup:
    """The group without its changes of a bias or norm."""
    parts = _vector_parts(group)
    if not parts:
        return group
    return replace(group, parts={k: v for k, v in group.parts.items() if k not in parts})


def _vector_parts(group: TensorGroup) -> set[str]:
    found = group.parts.keys() & VECTOR_KEY_SUFFIXES.keys()
    # LyCORIS and ComfyUI write a norm's weight as they write a whole layer's change.
    if "diff" in group.parts and group.parts["diff"].ndim == 1:
        found = found | {"diff"}
    return set(found)


def decode_vectors(group: TensorGroup, factor: float) -> dict[str, VectorUpdate]:
    """The changes of a layer's "weight" (of a norm) and "bias" that a group holds.

    Args:
        factor: what the layer's update is multiplied by, for biases of the projections.

    Raises:
        ConceptError: one is not a vector, not finite, or there are two of one parameter.
    """
    found: dict[str, VectorUpdate] = {}

    def add(parameter: str, part: str, values: Tensor, is_replacement: bool = False) -> None:
        if parameter in found:
            raise ConceptError(f"{group.keys[part]} and another key change the same {parameter}")
        found[parameter] = VectorUpdate(values, is_replacement)

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
    return found


def split_by_parameter(
    vectors: Mapping[str, VectorUpdate], rows: Sequence[RowRange], is_norm: bool
) -> dict[str, VectorUpdate]:
    """Changes of a layer's weight vector and bias, by the parameters of the modules they are for.

    Raises:
        ConceptError: they are of another width, or of the weight of a layer that has a matrix.
    """
    found: dict[str, VectorUpdate] = {}
    width = sum(each.stop - each.start for each in rows)
    for kind, vector in vectors.items():
        if kind == "weight" and not is_norm:
            raise ConceptError("a vector is no change of a layer's weight matrix")
        if len(vector.values) != width:
            raise ConceptError(
                f"a change of {len(vector.values)} numbers does not fit a {kind} of {width}"
            )
        start = 0
        for each in rows:
            stop = start + each.stop - each.start
            name = f"{each.module}.{kind}"
            values, start = vector.values[start:stop], stop
            if name in found:  # the halves of a layer that is the other way round in the original
                parts = [found[name].values, values]
                values = torch.cat(parts if each.start else parts[::-1])
            found[name] = VectorUpdate(values, vector.is_replacement)
    return found


def norm_widths(family: Family, component: str) -> dict[str, int]:
    """The modules of a component with a weight vector, such as norms: name -> width."""
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
    """(the name in the files of those who made the model, the model's name) of norms."""
    if component != family.denoiser_key:
        return
    parents: dict[str, str] = {}
    for original, rows in family.original_names().items():
        ours = rows[0].module
        while "." in ours and "." in original:
            ours, leaf = ours.rpartition(".")[::2]
            original, other = original.rpartition(".")[::2]
            parents.setdefault(ours, original)
            if leaf != other and not leaf.endswith(other):
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
    """What the bias of the down-projection adds behind the up-projection; 0 without one."""
    if "down_bias" not in group.parts:
        return torch.zeros(())
    up = group.parts.get("up")
    if up is None:
        raise ConceptError(f"the layer has {group.keys['down_bias']} and no up-projection")
    down = _read_vector(group, "down_bias")
    if up.flatten(1).shape[1] != len(down):
        raise ConceptError(f"{group.keys['down_bias']} of {len(down)} numbers does not fit")
    return factor * (up.flatten(1).float() @ down)


def _read_vector(group: TensorGroup, part: str) -> Tensor:
    values = group.parts[part]
    if not values.is_floating_point() or values.numel() == 0 or values.numel() != max(values.shape):
        raise ConceptError(
            f"{group.keys[part]} of shape {tuple(values.shape)} and type {values.dtype} is no "
            "vector of numbers"
        )
    if not all_finite(values.float()):
        raise ConceptError(f"{group.keys[part]} has a number that is NaN or infinite")
    return values.flatten().float()

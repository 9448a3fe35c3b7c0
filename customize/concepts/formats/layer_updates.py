"""The parts of one layer's update, whatever method wrote them, as one product."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MappingProxyType

import torch
from torch import Tensor

from customize.concepts.formats.oft_updates import ROTATED, rotated, rotated_parts
from customize.concepts.formats.peft_config import Config, subtracted_initialization
from customize.concepts.formats.tensor_keys import OFT_SPLITS, TensorGroup
from customize.core import lycoris
from customize.core.lowrank import LowRank, all_finite, from_dense, weighted_sum
from customize.core.truncation import truncate
from customize.errors import ConceptError

#: The rank that the parts show, or None where they show none, to the factor of the product.
Scale = Callable[[int | None], float]

NO_CONFIG: Config = MappingProxyType({})

_HADA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_MAGNITUDES = {"dora_scale", "magnitude"}


def needs_weight(group: TensorGroup) -> bool:
    """Whether the update depends on the weight that it changes: DoRA, OFT and BOFT."""
    return bool(group.parts.keys() & (_MAGNITUDES | ROTATED))


def update_of(
    group: TensorGroup, scale: Scale, weight: Callable[[], Tensor], config: Config = NO_CONFIG
) -> LowRank:
    """The update that a layer's parts make.

    Exact but for one rounding to float32; of the methods that need the weight it is the change at
    full strength, dense.

    Args:
        scale: for the files that give no alpha with the layer.
        weight: gives the weight as it is without adapters, (out, in) or (out, in, kh, kw); called
            only where it is needed.
        config: peft's configuration, for what else it says.

    Raises:
        ConceptError: parts are missing or too many, do not fit together, or are not finite.
    """
    parts = {part: _checked(group, part) for part in group.parts}
    if "alpha" in parts:
        alpha: float | None = _alpha(group, parts.pop("alpha"))
        own = _from_alpha(float(alpha or 0.0))
    else:
        alpha, own = None, scale
    if parts.keys() & ROTATED:
        _take(group, parts, *rotated_parts(parts))
        return from_dense(rotated(group, parts, alpha, weight, config))
    magnitudes = [parts.pop(part) for part in sorted(_MAGNITUDES & parts.keys())]
    added = _added(group, parts, own)
    if subtracted_initialization(config) is not None:
        added = _without_start(group, added, weight(), str(subtracted_initialization(config)))
    if not magnitudes:
        if config.get("use_dora") and "down" in group.parts:
            raise ConceptError(
                "the adapter's configuration says that it is a DoRA (use_dora), and the layer has "
                "no magnitudes",
                fix="get the whole file from its maker",
            )
        return added
    if len(magnitudes) > 1:
        raise ConceptError("the layer has two sets of magnitudes")
    (magnitude,) = magnitudes
    if "magnitude" in group.parts:  # peft's, of the rows, also where they stand as (1, out, 1, 1)
        magnitude = magnitude.flatten()
    return from_dense(lycoris.dora_delta(weight(), added, magnitude))


def shape_of(group: TensorGroup) -> tuple[int | None, int | None]:
    """(out, in) as far as the parts show it without the layer; None for what they do not."""
    parts = {part: tensor.shape for part, tensor in group.parts.items() if tensor.ndim > 1}
    if {"up", "down"} <= parts.keys():
        kernel = math.prod(parts["mid"][2:]) if "mid" in parts else 1
        return parts["up"][0], math.prod(parts["down"][1:]) * kernel
    if parts.keys() >= _HADA and "hada_t1" not in parts:
        return parts["hada_w1_a"][0], parts["hada_w1_b"][1]
    if "diff" in parts:
        return parts["diff"][0], math.prod(parts["diff"][1:])
    blocks = [parts[part] for part in ("oft_blocks", "oft_diag", *OFT_SPLITS) if part in parts]
    if blocks and all(len(each) > 2 for each in blocks):
        return sum(each[-3] * each[-1] for each in blocks), None
    if "boft_R" in parts and len(parts["boft_R"]) > 2:
        return None, parts["boft_R"][-3] * parts["boft_R"][-1]
    return None, None


def _without_start(group: TensorGroup, added: LowRank, weight: Tensor, start: str) -> LowRank:
    """The update of a LoRA whose start peft took out of the base's weight before training."""
    if "down" not in group.parts or weight.ndim != 2:
        raise ConceptError(
            f"the adapter was begun with init_lora_weights={start}, which peft does "
            "with the factors of linear layers alone"
        )
    initial = lycoris.initial_adapter(weight, group.parts["down"].shape[0], added.scale, start)
    if initial.shape != added.shape:
        raise ConceptError(f"an update of shape {added.shape} does not fit {tuple(weight.shape)}")
    change = weighted_sum([added, initial], [1.0, -1.0])
    # Both are as large as the weight: rounded one by one to half precision, as adapters on such a
    # base are, they would leave more error than change.
    near = truncate(change, change.rank)
    return LowRank(near.up.float(), near.down.float(), near.scale)


def _added(group: TensorGroup, parts: dict[str, Tensor], scale: Scale) -> LowRank:
    if "diff" in parts:
        _take(group, parts, {"diff"})
        return from_dense(parts["diff"])
    if any(part.startswith("hada") for part in parts):
        cores = {"hada_t1", "hada_t2"} & parts.keys() and {"hada_t1", "hada_t2"}
        _take(group, parts, _HADA | set(cores))
        both = [
            _product(parts, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}" if cores else None)
            for n in (1, 2)
        ]
        return _scaled(lycoris.hadamard_product(*both), scale(parts["hada_w1_b"].shape[0]))
    if any(part.startswith("lokr") for part in parts):
        return _kronecker(group, parts, scale)
    _take(group, parts, {"down", "up"}, {"mid"})
    added = lycoris.tucker_product(parts["up"], parts["down"], parts.get("mid"))
    return _scaled(added, scale(parts["down"].shape[0]))


def _kronecker(group: TensorGroup, parts: dict[str, Tensor], scale: Scale) -> LowRank:
    expected: set[str] = set()
    sides, rank = [], None
    for side in ("lokr_w1", "lokr_w2"):
        core = "lokr_t2" if side == "lokr_w2" and "lokr_t2" in parts else None
        if side in parts:
            expected |= {side}
            sides.append(from_dense(parts[side]))
            continue
        pair = {f"{side}_a", f"{side}_b"}
        expected |= pair | ({core} if core else set())
        if parts.keys() >= pair:
            rank = parts[f"{side}_b"].shape[0]
            sides.append(_product(parts, f"{side}_a", f"{side}_b", core))
    _take(group, parts, expected)
    # A product of two whole matrices has no rank, and is not scaled by LyCORIS.
    if rank is None and "alpha" in group.parts:
        return lycoris.kronecker_product(*sides)
    return _scaled(lycoris.kronecker_product(*sides), scale(rank))


def _product(parts: dict[str, Tensor], a: str, b: str, core: str | None) -> LowRank:
    if core is None:
        return LowRank(parts[a], parts[b])
    return lycoris.tucker_product(parts[a].mT, parts[b], parts[core])


def _scaled(update: LowRank, factor: float) -> LowRank:
    return LowRank(update.up, update.down, update.scale * factor)


def _from_alpha(alpha: float) -> Scale:
    return lambda rank: alpha / rank if rank else 1.0


def _take(
    group: TensorGroup, parts: dict[str, Tensor], needed: set[str], allowed: set[str] | None = None
) -> None:
    missing = needed - parts.keys()
    if missing:
        raise ConceptError(f"the layer has {_said(group.parts)} and no {_said(missing)}")
    more = parts.keys() - needed - (allowed or set())
    if more:
        raise ConceptError(f"the layer has {_said(more)} beside {_said(needed)}")


def _said(parts: object) -> str:
    names = {"down": "down-projection", "up": "up-projection", "mid": "core"}
    return " and ".join(names.get(part, part) for part in sorted(parts))  # type: ignore[call-overload]


def _checked(group: TensorGroup, part: str) -> Tensor:
    tensor = group.parts[part]
    if not tensor.is_floating_point() and part not in ("alpha", "oft_scaled"):
        raise ConceptError(f"{group.keys[part]} has numbers of type {tensor.dtype}")
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        tensor = tensor.to(torch.float32)
    if not all_finite(tensor):
        raise ConceptError(f"{group.keys[part]} has a number that is NaN or infinite")
    if part not in ("alpha", "oft_scaled") and (tensor.numel() == 0 or tensor.ndim == 0):
        raise ConceptError(f"{group.keys[part]} is empty")
    if tensor.ndim < 2 and part not in (
        *("alpha", "magnitude", "dora_scale", "rescale", "boft_s", "oft_scaled"),
    ):
        raise ConceptError(f"{group.keys[part]} is no matrix: its shape is {tuple(tensor.shape)}")
    return tensor


def _alpha(group: TensorGroup, tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise ConceptError(f"{group.keys['alpha']} is not one number")
    return float(tensor)

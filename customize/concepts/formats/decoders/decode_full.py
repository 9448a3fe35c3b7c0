"""Full differences: the dense change of a weight, as LyCORIS ("full") and ComfyUI store it."""

from __future__ import annotations

import math

from customize.concepts.formats.decoders.update_format import LayerTensors, Shapes, UpdateFormat
from customize.core.lowrank import LowRank, from_dense


def _decode(layer: LayerTensors) -> LowRank:
    layer.check_parts({"diff"})
    return from_dense(layer.parts["diff"])


def _shape(shapes: Shapes) -> tuple[int | None, int | None]:
    if "diff" not in shapes:
        return None, None
    return shapes["diff"][0], math.prod(shapes["diff"][1:])


FULL = UpdateFormat(
    name="full difference",
    key_suffixes={"diff": (".diff",)},
    matches=lambda parts: "diff" in parts,
    decode=_decode,
    shape=_shape,
)

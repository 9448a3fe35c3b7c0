"""LoKr: the Kronecker product of two matrices (LyCORIS, arXiv 2309.14859, section 3).

``dW = (alpha / r) w1 x w2``; each of w1 and w2 is stored as a whole matrix, or as the factors
``w_a w_b``, and the second also with a core t2 for convolutions.
"""

from __future__ import annotations

from customize.concepts.formats.decoders.update_format import (
    LayerTensors,
    UpdateFormat,
    scale_update,
)
from customize.core.lowrank import LowRank, from_dense
from customize.core.lycoris import kronecker_product, tucker_product

_PARTS = (
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b"),
    *("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)


def _decode(layer: LayerTensors) -> LowRank:
    required: set[str] = set()
    matrices: list[LowRank] = []
    rank = None
    for side in ("lokr_w1", "lokr_w2"):
        if side in layer.parts:
            required.add(side)
            matrices.append(from_dense(layer.parts[side]))
            continue
        a, b = f"{side}_a", f"{side}_b"
        has_core = side == "lokr_w2" and "lokr_t2" in layer.parts
        required |= {a, b, "lokr_t2"} if has_core else {a, b}
        if layer.parts.keys() >= {a, b}:
            rank = layer.parts[b].shape[0]
            matrices.append(
                tucker_product(layer.parts[a].mT, layer.parts[b], layer.parts["lokr_t2"])
                if has_core
                else LowRank(layer.parts[a], layer.parts[b])
            )
    layer.check_parts(required)
    # LyCORIS does not scale a product of two whole matrices, which has no rank.
    if rank is None and layer.alpha is not None:
        return kronecker_product(*matrices)
    return scale_update(kronecker_product(*matrices), layer.scale(rank))


LOKR = UpdateFormat(
    name="LoKr",
    key_suffixes={part: (f".{part}",) for part in _PARTS},
    matches=lambda parts: any(part.startswith("lokr_") for part in parts),
    decode=_decode,
    rank_parts=("lokr_w2_b", "lokr_w1_b"),
)

"""LoHa: the elementwise product of two low-rank updates (LyCORIS, arXiv 2309.14859, section 3).

``dW = (alpha / r) (w1_a w1_b) * (w2_a w2_b)``; convolutions may have a core t1, t2 in each product
(FedPara, arXiv 2108.06098, proposition 3).
"""

from __future__ import annotations

from customize.concepts.formats.decoders.update_format import (
    LayerTensors,
    Shapes,
    UpdateFormat,
    scale_update,
)
from customize.core.lowrank import LowRank
from customize.core.lycoris import hadamard_product, tucker_product

_FACTORS = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_CORES = frozenset({"hada_t1", "hada_t2"})


def _decode(layer: LayerTensors) -> LowRank:
    has_cores = bool(_CORES & layer.parts.keys())
    layer.check_parts(_FACTORS | _CORES if has_cores else _FACTORS)
    products = []
    for index in (1, 2):
        a, b = layer.parts[f"hada_w{index}_a"], layer.parts[f"hada_w{index}_b"]
        if has_cores:
            products.append(tucker_product(a.mT, b, layer.parts[f"hada_t{index}"]))
        else:
            products.append(LowRank(a, b))
    return scale_update(hadamard_product(*products), layer.scale(layer.parts["hada_w1_b"].shape[0]))


def _shape(shapes: Shapes) -> tuple[int | None, int | None]:
    if not shapes.keys() >= _FACTORS or "hada_t1" in shapes:
        return None, None
    return shapes["hada_w1_a"][0], shapes["hada_w1_b"][1]


LOHA = UpdateFormat(
    name="LoHa",
    key_suffixes={part: (f".{part}",) for part in sorted(_FACTORS | _CORES)},
    matches=lambda parts: any(part.startswith("hada_") for part in parts),
    decode=_decode,
    shape=_shape,
    rank_parts=("hada_w1_b",),
)

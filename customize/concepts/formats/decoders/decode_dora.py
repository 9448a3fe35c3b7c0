"""DoRA: an update with new lengths of the weight's rows or columns (arXiv 2402.09353, eq. 5).

``dW = m V / |V| - W`` with ``V = W + dV``, where dV is an update of another format.
"""

from __future__ import annotations

from customize.concepts.formats.decoders.update_format import LayerTensors, UpdateFormat
from customize.core.lowrank import LowRank, from_dense
from customize.core.lycoris import dora_delta
from customize.errors import ConceptError

#: dora_scale: of LyCORIS and kohya, for rows or columns; magnitude: of peft, for rows.
MAGNITUDES = frozenset({"dora_scale", "magnitude"})


def _decode(layer: LayerTensors) -> LowRank:
    update = layer.decode(layer.without(MAGNITUDES))
    magnitudes = [layer.parts[part] for part in sorted(MAGNITUDES & layer.parts.keys())]
    if len(magnitudes) > 1:
        raise ConceptError("the layer has two sets of magnitudes")
    (magnitude,) = magnitudes
    if "magnitude" in layer.parts:  # of shape (out,), or of a convolution (1, out, 1, 1)
        magnitude = magnitude.flatten()
    return from_dense(dora_delta(layer.weight(), update, magnitude))


DORA = UpdateFormat(
    name="DoRA",
    key_suffixes={
        "dora_scale": (".dora_scale",),
        "magnitude": (
            ".lora_magnitude_vector",
            ".lora_magnitude_vector.weight",
            ".lora_magnitude_vector.*.weight",
            ".lora_magnitude_vector.*",
        ),
    },
    matches=lambda parts: bool(parts & MAGNITUDES),
    decode=_decode,
    vector_parts=MAGNITUDES,
    needs_base_weight=True,
)

"""BOFT of peft: columns rotated in butterfly stages (arXiv 2311.06243).

LyCORIS stores BOFT by the keys of OFT; see :mod:`customize.concepts.formats.decoders.decode_oft`.
"""

from __future__ import annotations

from customize.concepts.formats.decoders.update_format import LayerTensors, Shapes, UpdateFormat
from customize.core.lowrank import LowRank, from_dense
from customize.core.oft import boft_column_delta


def _decode(layer: LayerTensors) -> LowRank:
    layer.check_parts({"boft_R", "boft_s"})
    return from_dense(
        boft_column_delta(layer.weight(), layer.parts["boft_R"], layer.parts["boft_s"])
    )


def _shape(shapes: Shapes) -> tuple[int | None, int | None]:
    blocks = shapes.get("boft_R", ())
    return None, blocks[-3] * blocks[-1] if len(blocks) > 2 else None


BOFT = UpdateFormat(
    name="BOFT",
    key_suffixes={"boft_R": (".boft_R", ".boft_R.*"), "boft_s": (".boft_s", ".boft_s.*")},
    matches=lambda parts: "boft_R" in parts,
    decode=_decode,
    shape=_shape,
    vector_parts=frozenset({"boft_s"}),
    needs_base_weight=True,
)

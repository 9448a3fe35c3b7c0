"""LoRA: the product of two factors (arXiv 2106.09685), with a core for convolutions (LoCon).

``dW = (alpha / r) up down``. Where peft initialized the factors with a part of the base weight and
subtracted that from it (PiSSA, OLoRA), the same part is subtracted from the product.
"""

from __future__ import annotations

import math

from customize.concepts.formats.decoders.decode_dora import MAGNITUDES
from customize.concepts.formats.decoders.update_format import (
    LayerTensors,
    Shapes,
    UpdateFormat,
    scale_update,
)
from customize.concepts.formats.peft_config import subtracted_initialization
from customize.core.lowrank import LowRank, weighted_sum
from customize.core.lycoris import initial_adapter, tucker_product
from customize.core.truncation import truncate
from customize.errors import ConceptError


def _decode(layer: LayerTensors) -> LowRank:
    layer.check_parts({"down", "up"}, {"mid"})
    if layer.config.get("use_dora") and not MAGNITUDES & layer.group.parts.keys():
        raise ConceptError(
            "the adapter's configuration declares a DoRA (use_dora), and the layer has no"
            " magnitudes",
            fix="get the whole file from its maker",
        )
    down = layer.parts["down"]
    update = tucker_product(layer.parts["up"], down, layer.parts.get("mid"))
    update = scale_update(update, layer.scale(down.shape[0]))
    initialization = subtracted_initialization(layer.config)
    return update if initialization is None else _subtract_initial(layer, update, initialization)


def _subtract_initial(layer: LayerTensors, update: LowRank, initialization: str) -> LowRank:
    """Subtract the initial adapter, which peft subtracted from the base weight before training."""
    weight = layer.weight()
    if weight.ndim != 2:
        raise wrong_initialization(initialization)
    rank = layer.parts["down"].shape[0]
    initial = initial_adapter(weight, rank, update.scale, initialization)
    if initial.shape != update.shape:
        raise ConceptError(f"an update of shape {update.shape} does not fit {tuple(weight.shape)}")
    change = weighted_sum([update, initial], [1.0, -1.0])
    # Both are as large as the weight. Truncation balances the factors, so that rounding them to the
    # half precision of a base does not lose more than the difference.
    balanced = truncate(change, change.rank)
    return LowRank(balanced.up.float(), balanced.down.float(), balanced.scale)


def wrong_initialization(initialization: str) -> ConceptError:
    """The error for a layer that peft cannot have initialized in this way."""
    return ConceptError(
        f"the adapter was initialized with init_lora_weights={initialization}, which peft supports"
        " for the factors of linear layers alone"
    )


def _shape(shapes: Shapes) -> tuple[int | None, int | None]:
    if not shapes.keys() >= {"up", "down"}:
        return None, None
    kernel = math.prod(shapes["mid"][2:]) if "mid" in shapes else 1
    return shapes["up"][0], math.prod(shapes["down"][1:]) * kernel


LORA = UpdateFormat(
    name="LoRA",
    key_suffixes={
        "down": (
            ".lora_A.weight",
            ".lora_A.*.weight",
            ".lora_down.weight",
            ".lora.down.weight",
            "_lora.down.weight",
            ".lora_linear_layer.down.weight",
            ".down.weight",
        ),
        "up": (
            ".lora_B.weight",
            ".lora_B.*.weight",
            ".lora_up.weight",
            ".lora.up.weight",
            "_lora.up.weight",
            ".lora_linear_layer.up.weight",
            ".up.weight",
        ),
        "mid": (".lora_mid.weight",),
    },
    matches=lambda parts: bool(parts & {"down", "up", "mid"}),
    decode=_decode,
    shape=_shape,
    rank_parts=("down",),
)

"""OFT: rotations of blocks of rows or columns (arXiv 2306.07280), as five programs store them.

peft, OneTrainer and newer sd-scripts rotate columns (oft_R), LyCORIS and sd-scripts rows. The
meaning of ``alpha`` differs: in sd-scripts (keys that begin with ``oft_unet_``) it bounds the
generators, also if it is 0; in LyCORIS 0 means no bound; older LyCORIS stores the rotations
themselves (oft_diag) and ignores it; the others have none.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from customize.concepts.formats.decoders.update_format import LayerTensors, Shapes, UpdateFormat
from customize.core.lowrank import LowRank, from_dense
from customize.core.oft import (
    oft_column_delta,
    oft_row_delta,
    row_rotation_delta,
    validate_rotations,
)
from customize.errors import ConceptError

# Terms of the Neumann series: peft's default, and constant in OneTrainer and sd-scripts.
_NEUMANN_TERMS = 5

# sd-scripts' OFT of FLUX has separate blocks for the parts of a layer that diffusers splits.
_SPLIT_BLOCKS = ("oft_blocks_0", "oft_blocks_1", "oft_blocks_2", "oft_blocks_3")
_ROTATIONS = frozenset({"oft_blocks", "oft_diag", "oft_R", *_SPLIT_BLOCKS})


def _decode(layer: LayerTensors) -> LowRank:
    parts = layer.parts
    if "oft_R" in parts:
        layer.check_parts({"oft_R"}, {"oft_scaled"})
        return from_dense(_column_delta(layer))
    if "oft_diag" in parts:
        layer.check_parts({"oft_diag"}, {"rescale"})
        rotations = validate_rotations(parts["oft_diag"])
        return from_dense(row_rotation_delta(layer.weight(), rotations, parts.get("rescale")))
    if "oft_blocks" in parts:
        layer.check_parts({"oft_blocks"}, {"rescale"})
        bound = _generator_bound(layer)
        weight, blocks = layer.weight(), parts["oft_blocks"]
        return from_dense(oft_row_delta(weight, blocks, bound, parts.get("rescale")))
    count = sum(split in parts for split in _SPLIT_BLOCKS)
    layer.check_parts(set(_SPLIT_BLOCKS[:count]))
    return from_dense(_split_row_delta(layer))


def _generator_bound(layer: LayerTensors) -> float | None:
    """The bound of the generators' norm; None for no bound."""
    if not layer.group.path.startswith("oft_unet_"):
        return layer.alpha or None
    if layer.alpha is None:
        raise ConceptError(
            "the layer has OFT's blocks and no alpha, which bounds them in sd-scripts",
            fix="get the whole file from its maker",
        )
    return layer.alpha


def _split_row_delta(layer: LayerTensors) -> Tensor:
    bound = _generator_bound(layer)
    weight = layer.weight()
    blocks = [layer.parts[split] for split in _SPLIT_BLOCKS if split in layer.parts]
    if any(block.ndim != 3 for block in blocks):
        raise ConceptError("the layer has OFT's blocks that are not (n, b, b)")
    counts = [block.shape[0] * block.shape[1] for block in blocks]
    if sum(counts) != len(weight):
        raise ConceptError(f"blocks of {counts} rows do not rotate {len(weight)} rows")
    rows = zip(weight.split(counts), blocks, strict=True)
    return torch.cat([oft_row_delta(part, block, bound, None) for part, block in rows])


def _column_delta(layer: LayerTensors) -> Tensor:
    """OFT of peft, as its configuration describes it, or of OneTrainer and newer sd-scripts."""
    weight, entries, config = layer.weight(), layer.parts["oft_R"], layer.config
    if "oft_scaled" in layer.parts:  # OneTrainer's marker for entries that are not normalized
        entries = entries / entries.shape[-1] ** 0.5
    is_convolution = weight.ndim > 2
    if re.match(r"(lora|lycoris)_", layer.group.path):
        return oft_column_delta(weight, entries, terms=_NEUMANN_TERMS, swapped=is_convolution)
    if config.get("peft_type") is None:
        raise ConceptError(
            "the layer has peft's OFT, whose rotations depend on a configuration that is missing",
            fix="put the adapter_config.json that peft saved with it into the same folder",
        )
    if is_convolution and any(side != 1 for side in weight.shape[2:]):
        raise ConceptError(
            "peft's OFT rotates the patches that a convolution reads, which no change of its "
            "weight can represent",
            fix="ask its maker for one without convolutions, or use it with peft",
        )
    terms = config.get("num_cayley_neumann_terms", _NEUMANN_TERMS)
    return oft_column_delta(
        weight,
        entries,
        terms=int(terms) if config.get("use_cayley_neumann", True) else None,
        limit=float(config.get("eps", 6e-5)) if config.get("coft") else None,
    )


def _shape(shapes: Shapes) -> tuple[int | None, int | None]:
    blocks = [shapes[part] for part in ("oft_blocks", "oft_diag", *_SPLIT_BLOCKS) if part in shapes]
    if not blocks or any(len(block) < 3 for block in blocks):
        return None, None
    return sum(block[-3] * block[-1] for block in blocks), None


OFT = UpdateFormat(
    name="OFT",
    key_suffixes={
        "oft_blocks": (".oft_blocks",),
        **{split: (f".oft_blocks.{split[-1]}",) for split in _SPLIT_BLOCKS},
        "oft_diag": (".oft_diag",),
        "oft_R": (".oft_R.weight", ".oft_R.*.weight"),
        "oft_scaled": (".oft_R.scaled_oft",),
        "rescale": (".rescale",),
    },
    matches=lambda parts: bool(parts & _ROTATIONS),
    decode=_decode,
    shape=_shape,
    vector_parts=frozenset({"rescale"}),
    scalar_parts=frozenset({"oft_scaled"}),
    needs_base_weight=True,
)

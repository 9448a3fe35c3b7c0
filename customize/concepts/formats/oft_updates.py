"""The parts of one layer that OFT or BOFT turns, whatever program wrote them, as a dense change.

What ``alpha`` means differs: in sd-scripts' OFT (keys that begin with ``oft_unet_``) it bounds the
generators, also where it is 0; in LyCORIS 0 means no bound; older LyCORIS stores the rotations
(``oft_diag``) and does not use it; peft's, OneTrainer's and newer sd-scripts' have none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from customize.concepts.formats.peft_config import Config
from customize.concepts.formats.tensor_keys import OFT_SPLITS, TensorGroup
from customize.core import oft
from customize.errors import ConceptError

_TERMS = 5  # of the Neumann series in peft by default, and always in OneTrainer and sd-scripts
#: Any of these parts makes a layer one of OFT or BOFT.
ROTATED = frozenset({"oft_blocks", "oft_diag", "oft_R", "boft_R", *OFT_SPLITS})
_BY_SD_SCRIPTS = "oft_unet_"


def rotated_parts(parts: Mapping[str, Tensor]) -> tuple[set[str], set[str]]:
    """(the parts that such a layer must have, those that it may have), beside alpha."""
    if "oft_R" in parts:
        return {"oft_R"}, {"oft_scaled"}
    if "boft_R" in parts:
        return {"boft_R", "boft_s"}, set()
    if "oft_diag" in parts:
        return {"oft_diag"}, {"rescale"}
    if "oft_blocks" in parts:
        return {"oft_blocks"}, {"rescale"}
    count = sum(split in parts for split in OFT_SPLITS)
    return set(OFT_SPLITS[:count]), set()


def rotated(
    group: TensorGroup,
    parts: Mapping[str, Tensor],
    alpha: float | None,
    weight: Callable[[], Tensor],
    config: Config,
) -> Tensor:
    """The change of the layer's weight, dense, in float32.

    Args:
        parts: those that :func:`rotated_parts` tells.
        alpha: None where the file gives none.
        weight: gives the weight, (out, in) or (out, in, *kernel).
        config: peft's configuration of the layer's component.

    Raises:
        ConceptError: the parts do not fit the weight, or alpha or a configuration is missing
            without which it is not known what the file means.
    """
    if "boft_R" in parts:
        return oft.boft_column_delta(weight(), parts["boft_R"], parts["boft_s"])
    if "oft_R" in parts:
        return _columns(group, parts, weight(), config)
    if "oft_diag" in parts:
        turns = oft.validate_rotations(parts["oft_diag"])
        return oft.row_rotation_delta(weight(), turns, parts.get("rescale"))
    limit = alpha or None
    if group.path.startswith(_BY_SD_SCRIPTS):
        if alpha is None:
            raise ConceptError(
                "the layer has OFT's blocks and no alpha, which bounds them in sd-scripts",
                fix="get the whole file from its maker",
            )
        limit = alpha
    if "oft_blocks" in parts:
        return oft.oft_row_delta(weight(), parts["oft_blocks"], limit, parts.get("rescale"))
    return _by_splits([parts[split] for split in OFT_SPLITS if split in parts], weight(), limit)


def _by_splits(blocks: list[Tensor], weight: Tensor, limit: float | None) -> Tensor:
    """sd-scripts' OFT of FLUX: blocks for each part of a layer that diffusers splits."""
    if any(each.ndim != 3 for each in blocks):
        raise ConceptError("the layer has OFT's blocks that are not (n, b, b)")
    counts = [each.shape[0] * each.shape[1] for each in blocks]
    if sum(counts) != len(weight):
        raise ConceptError(f"blocks of {counts} rows do not turn {len(weight)} rows")
    rows = zip(weight.split(counts), blocks, strict=True)
    return torch.cat([oft.oft_row_delta(part, each, limit, None) for part, each in rows])


def _columns(
    group: TensorGroup, parts: Mapping[str, Tensor], weight: Tensor, config: Config
) -> Tensor:
    """OFT of peft, as its configuration says; or of OneTrainer and newer sd-scripts."""
    entries = parts["oft_R"]
    if "oft_scaled" in parts:  # OneTrainer's marker: the entries are divided when they are used
        entries = entries / entries.shape[-1] ** 0.5
    wide = weight.ndim > 2
    if re.match(r"(lora|lycoris)_", group.path):
        return oft.oft_column_delta(weight, entries, terms=_TERMS, swapped=wide)
    if config.get("peft_type") is None:
        raise ConceptError(
            "the layer has peft's OFT, whose rotations depend on a configuration that is missing",
            fix="put the adapter_config.json that peft saved with it into the same folder",
        )
    if wide and any(side != 1 for side in weight.shape[2:]):
        raise ConceptError(
            "peft's OFT turns what a convolution reads patch by patch, which no change of its "
            "weight does",
            fix="ask its maker for one without convolutions, or use it with peft",
        )
    terms = config.get("num_cayley_neumann_terms", _TERMS)
    return oft.oft_column_delta(
        weight,
        entries,
        terms=int(terms) if config.get("use_cayley_neumann", True) else None,
        limit=float(config.get("eps", 6e-5)) if config.get("coft") else None,
    )

"""Scales by block of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from customize.errors import ConfigError
from customize.families import Family
from customize.references.scale import SCALE_ARGUMENT, check_scales
from customize.references.seams.attachment import Scale


def expand_block_scale(family: Family, scale: Mapping[str, Any]) -> Scale:
    """Convert scales by block to a function of a module's name.

    Args:
        family: The model, with a transformer.
        scale: ``{"transformer_blocks": numbers}``, with one for each of the transformer's blocks.

    Raises:
        ConfigError: There is another key, or another number of blocks.
    """
    check_scales(scale)
    count = len(family.denoiser.transformer_blocks)
    numbers = scale.get("transformer_blocks")
    if set(scale) != {"transformer_blocks"} or not isinstance(numbers, list | tuple):
        numbers = ()
    if len(numbers) != count:
        raise ConfigError(
            "the scales by block do not fit the transformer",
            where=SCALE_ARGUMENT,
            fix=f'give {{"transformer_blocks": [...]}} with {count} numbers',
        )

    def scale_of_module(name: str) -> float:
        kind, _, rest = name.partition(".")
        # Further blocks have a LoRA alone, which has the strength of the strongest block.
        if kind != "transformer_blocks":
            return float(max(numbers))
        return float(numbers[int(rest.partition(".")[0])])

    return scale_of_module

"""The blocks of diffusers' modular pipelines."""

from __future__ import annotations

from typing import Any


def has_block(pipe: Any, attribute: str) -> bool:
    """Return whether a pipeline is modular and has a block with a true attribute, at any depth."""
    blocks = [vars(pipe).get("_blocks")]  # `pipe.blocks` is a copy of it
    while blocks:
        block = blocks.pop()
        if getattr(block, attribute, False):
            return True
        blocks += dict(getattr(block, "sub_blocks", None) or {}).values()
    return False

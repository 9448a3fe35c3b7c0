"""The denoisers' repeated blocks, compiled by torch while a concept is learned.

Block by block, as diffusers' ``compile_repeated_blocks`` does: equal blocks are compiled once, so
it takes a minute or so where a whole model takes many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from customize.errors import ConfigError
from customize.families.pipeline_components import uncompiled

_BACKEND = "inductor"
_CALL = "_compiled_call_impl"  # what Module.compile puts on a module, and calls from then on


def check_compiler(device: torch.device) -> None:
    """See that torch can compile for a device, on a single operation.

    Raises:
        ConfigError: it can't, as where there is no C++ compiler.
    """
    try:
        torch.compile(torch.sin, backend=_BACKEND)(torch.ones(2, device=device))
    except Exception as error:  # what compilers raise is of no one kind
        reason = " ".join(str(error).splitlines()[:2])  # the first says which part of torch it was
        raise ConfigError(
            f"torch cannot compile for the device {device.type}: {reason}",
            where="compile",
            fix="install the compiler that it asks for, or set compile to no (--no-compile)",
        ) from error


def repeated_blocks(denoiser: Any) -> list[nn.Module]:
    """The blocks that a model of diffusers names as equal, or its transformer blocks."""
    model = uncompiled(denoiser)
    named = [each for each in model.modules() if type(each).__name__ in model._repeated_blocks]
    return named or list(model.transformer_blocks)


@contextmanager
def compiled_blocks(denoisers: Iterable[Any]) -> Iterator[None]:
    """Compile the blocks at their first call; afterwards they are called as before."""
    blocks = [block for denoiser in denoisers for block in repeated_blocks(denoiser)]
    before = [vars(block).get(_CALL) for block in blocks]
    try:
        for block in blocks:
            block.compile(backend=_BACKEND)
        yield
    finally:
        for block, call in zip(blocks, before, strict=True):
            vars(block).pop(_CALL, None)
            if call is not None:
                vars(block)[_CALL] = call

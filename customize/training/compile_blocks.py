"""Compilation of the denoisers' repeated blocks by torch during training.

Like diffusers' ``compile_repeated_blocks``, it compiles equal blocks once, which takes about a
minute instead of the many minutes of a whole model.
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
_CALL = "_compiled_call_impl"  # the attribute that Module.compile sets and Module calls


def check_compiler(device: torch.device) -> None:
    """Check on a single operation that torch can compile for a device.

    Raises:
        ConfigError: Compilation fails, for example because there is no C++ compiler.
    """
    try:
        torch.compile(torch.sin, backend=_BACKEND)(torch.ones(2, device=device))
    except Exception as error:  # compilers raise errors of many types
        reason = " ".join(str(error).splitlines()[:2])  # the first names the part of torch
        raise ConfigError(
            f"torch cannot compile for the device {device.type}: {reason}",
            where="compile",
            fix="install the compiler that it asks for, or set compile to no (--no-compile)",
        ) from error


def repeated_blocks(denoiser: Any) -> list[nn.Module]:
    """Return the blocks that a diffusers model declares as repeated, or its transformer blocks."""
    model = uncompiled(denoiser)
    blocks = [
        module for module in model.modules() if type(module).__name__ in model._repeated_blocks
    ]
    return blocks or list(model.transformer_blocks)


@contextmanager
def compiled_blocks(denoisers: Iterable[Any]) -> Iterator[None]:
    """Compile the repeated blocks at their first call; restore their calls at the end."""
    blocks = [block for denoiser in denoisers for block in repeated_blocks(denoiser)]
    previous = [vars(block).get(_CALL) for block in blocks]
    try:
        for block in blocks:
            block.compile(backend=_BACKEND)
        yield
    finally:
        for block, call in zip(blocks, previous, strict=True):
            vars(block).pop(_CALL, None)
            if call is not None:
                vars(block)[_CALL] = call

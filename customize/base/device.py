"""The torch device that a user names, checked before models are moved to it."""

from __future__ import annotations

import torch

from customize.errors import ConfigError


def choose_device(name: str | None, where: str) -> torch.device:
    """Check that a device works, or choose the fastest available one.

    Args:
        name: such as ``"cpu"`` or ``"cuda:1"``; None: CUDA, else MPS, else the CPU.
        where: the flag or setting that the name comes from, for the error.

    Raises:
        ConfigError: tensors cannot be moved to and from the device.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # fails on the device "meta", which stores no data
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"the device {name} cannot be used: {str(error).splitlines()[0]}",
            where=where,
            fix="name an available device, such as cpu or cuda:0, or leave it out",
        ) from error
    return device
